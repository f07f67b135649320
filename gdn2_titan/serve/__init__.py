"""GDN-2 in vLLM: a plug-in of its entry point group ``vllm.general_plugins``.

``config`` says what can be served, ``model`` is the decoder of vLLM's parallel layers, ``mixer`` the GDN-2 layer in it,
``metadata`` what vLLM tells that layer of a step, ``steps`` the layer's way through one, without vLLM.
"""

import logging
import re

__all__ = ["register"]

ARCHITECTURE = "GDN2ForCausalLM"
# The versions of vLLM that this package is tested with.
OLDEST, BEYOND = (0, 31), (0, 34)


def register() -> None:
    """Tell vLLM of the model: which class, which config, and what is to be checked before it is built.

    vLLM calls this in each of its processes, whichever model they serve, and may do so twice. No layer is imported. Of
    another version of vLLM nothing else is asked: its log has one sentence, and other models are served.
    """
    from vllm import __version__

    version = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
    if not OLDEST <= version < BEYOND:
        oldest, beyond = (".".join(map(str, x)) for x in (OLDEST, BEYOND))
        logging.getLogger("vllm").warning(
            "vllm is %s; to serve GDN-2 it must be at least %s and less than %s", __version__, oldest, beyond
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import gdn2_titan.convert.hf  # noqa: F401 (tells transformers of the config)

    from .config import GDN2Architecture, ServedGDN2

    ModelRegistry.register_model(ARCHITECTURE, "gdn2_titan.serve.model:GDN2ForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedGDN2
    MODEL_ARCH_CONFIG_CONVERTORS["gdn2"] = GDN2Architecture
