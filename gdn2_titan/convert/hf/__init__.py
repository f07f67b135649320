"""GDN-2 as a transformers model. Importing this tells transformers' Auto classes of it."""

import torch
import transformers

from gdn2_titan.convert.checkpoint_info import args_to_fields
from gdn2_titan.convert.checkpoints import Checkpoint
from gdn2_titan.convert.mapping import to_hf_name

from .cache_gdn2 import GDN2Cache
from .classification_gdn2 import GDN2ForQuestionAnswering, GDN2ForSequenceClassification, GDN2ForTokenClassification
from .code import save_code
from .configuration_gdn2 import GDN2Config
from .modeling_gdn2 import GDN2Decoder, GDN2ForCausalLM

__all__ = [
    "GDN2Cache", "GDN2Config", "GDN2Decoder", "GDN2ForCausalLM", "GDN2ForQuestionAnswering",
    "GDN2ForSequenceClassification", "GDN2ForTokenClassification", "load_checkpoint", "save_code",
]  # fmt: skip

transformers.AutoConfig.register("gdn2", GDN2Config)
transformers.AutoModel.register(GDN2Config, GDN2Decoder)
transformers.AutoModelForCausalLM.register(GDN2Config, GDN2ForCausalLM)
transformers.AutoModelForQuestionAnswering.register(GDN2Config, GDN2ForQuestionAnswering)
transformers.AutoModelForSequenceClassification.register(GDN2Config, GDN2ForSequenceClassification)
transformers.AutoModelForTokenClassification.register(GDN2Config, GDN2ForTokenClassification)


def load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> GDN2ForCausalLM:
    """GDN2ForCausalLM, in eval mode, of a Checkpoint. Reads one tensor at a time.

    dtype: of the parameters, except the decay's; None for that of the checkpoint.

    Raises:
        ConvertError: the checkpoint is damaged.
    """
    source = checkpoint.source
    with torch.device("meta"):
        model = GDN2ForCausalLM(GDN2Config(**args_to_fields(checkpoint.info.model_args)))
    model.to(dtype or source.tensors["lm_head.weight"].dtype)
    model.to_empty(device=device)
    places = model.state_dict()
    for name in source.tensors:
        places[to_hf_name(name)].copy_(source.read(name))
    return model.eval()
