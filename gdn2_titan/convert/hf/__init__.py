"""GDN-2 as a transformers model. Importing this tells transformers' Auto classes of it."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_gdn2 import GDN2Cache
from .classification_gdn2 import GDN2ForQuestionAnswering, GDN2ForSequenceClassification, GDN2ForTokenClassification
from .code import save_code
from .configuration_gdn2 import GDN2Config
from .modeling_gdn2 import GDN2Decoder, GDN2ForCausalLM

__all__ = [
    "GDN2Cache", "GDN2Config", "GDN2Decoder", "GDN2ForCausalLM", "GDN2ForQuestionAnswering",
    "GDN2ForSequenceClassification", "GDN2ForTokenClassification", "save_code",
]  # fmt: skip

AutoConfig.register("gdn2", GDN2Config)
AutoModel.register(GDN2Config, GDN2Decoder)
AutoModelForCausalLM.register(GDN2Config, GDN2ForCausalLM)
AutoModelForQuestionAnswering.register(GDN2Config, GDN2ForQuestionAnswering)
AutoModelForSequenceClassification.register(GDN2Config, GDN2ForSequenceClassification)
AutoModelForTokenClassification.register(GDN2Config, GDN2ForTokenClassification)
