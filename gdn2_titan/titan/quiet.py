"""Importing this, before TorchTitan, silences what others say at every start and nobody can act on: each by its own
words, with the reason."""

import logging
import warnings

import torch

__all__ = ["Unsaid"]

# Logger: beginnings of what it need not say.
EVERYWHERE = {
    # About a call in torchao's own source.
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported by ",),
}
WITHOUT_GPU = {
    # torchao tries all kernels that it was built with, and those for GPUs miss CUDA's libraries.
    "torchao": ("Failed to load ",),
    # Of TorchTitan: a CPU has no peak that it knows, and gloo is used instead of NCCL.
    None: ("Peak FLOPS used for computing MFU: ", "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = "),
}


class Unsaid(logging.Filter):
    """Of a logger: drops records that begin so."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


for name, beginnings in (EVERYWHERE if torch.cuda.is_available() else EVERYWHERE | WITHOUT_GPU).items():
    logging.getLogger(name).addFilter(Unsaid(beginnings))
# torchdata's data loader calls a function of torch that does nothing any more.
warnings.filterwarnings("ignore", "'set_vital' is deprecated")
# TorchTitan asks for automatic mixed precision where the precision asked for is float32: none.
warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")
