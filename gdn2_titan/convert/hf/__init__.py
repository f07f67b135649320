"""GDN-2 as a transformers model. Importing this tells transformers' Auto classes of it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_gdn2 import GDN2Cache
from .code import save_code
from .configuration_gdn2 import GDN2Config
from .modeling_gdn2 import GDN2Decoder, GDN2ForCausalLM

__all__ = ["GDN2Cache", "GDN2Config", "GDN2Decoder", "GDN2ForCausalLM", "save_code"]

AutoConfig.register("gdn2", GDN2Config)
AutoModel.register(GDN2Config, GDN2Decoder)
AutoModelForCausalLM.register(GDN2Config, GDN2ForCausalLM)
