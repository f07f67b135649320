"""GDN-2 as a transformers model. Importing this tells transformers' Auto classes of it."""

import transformers

from .cache_gdn2 import GDN2Cache
from .classification_gdn2 import GDN2ForQuestionAnswering, GDN2ForSequenceClassification, GDN2ForTokenClassification
from .code import save_code
from .configuration_gdn2 import GDN2Config
from .modeling_gdn2 import GDN2Decoder, GDN2ForCausalLM

__all__ = [
    "GDN2Cache", "GDN2Config", "GDN2Decoder", "GDN2ForCausalLM", "GDN2ForQuestionAnswering",
    "GDN2ForSequenceClassification", "GDN2ForTokenClassification", "save_code",
]  # fmt: skip

transformers.AutoConfig.register("gdn2", GDN2Config)
transformers.AutoModel.register(GDN2Config, GDN2Decoder)
transformers.AutoModelForCausalLM.register(GDN2Config, GDN2ForCausalLM)
transformers.AutoModelForQuestionAnswering.register(GDN2Config, GDN2ForQuestionAnswering)
transformers.AutoModelForSequenceClassification.register(GDN2Config, GDN2ForSequenceClassification)
transformers.AutoModelForTokenClassification.register(GDN2Config, GDN2ForTokenClassification)
