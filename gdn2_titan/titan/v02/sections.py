"""TorchTitan's job config with the sections that this package adds, and the stock defaults that it changes."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import job_config as stock

from ..byte_tokenizer import BYTE_TOKENIZER_DIR
from ..settings import GDN2, Data, Float8Linear, MXLinear, OptimizerFields, Task

__all__ = ["JobConfig", "Parallelism"]


@dataclass
class Model(stock.Model):
    name: str = "gdn2"
    flavor: str = "debug"
    hf_assets_path: str = str(BYTE_TOKENIZER_DIR)


@dataclass
class Parallelism(stock.Parallelism):
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """How sequences are dealt to context-parallel ranks. "headtail": to each a segment from the front and one from the
    back, the same share of causal attention; "none": one segment to each, which can spare sliding windows the exchange
    with all but neighbours"""


@dataclass
class Optimizer(OptimizerFields, stock.Optimizer):
    """Our fields beside the stock ones."""


@dataclass
class Checkpoint(stock.Checkpoint):
    last_save_model_only: bool = False
    """Stock TorchTitan says true; with false a finished run can be continued for more steps"""


@dataclass
class QuantizedLinear(stock.QuantizedLinear):
    float8: Float8Linear = field(default_factory=Float8Linear)
    mx: MXLinear = field(default_factory=MXLinear)


@dataclass
class Quantize(stock.Quantize):
    linear: QuantizedLinear = field(default_factory=QuantizedLinear)


@dataclass
class JobConfig(stock.JobConfig):
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    quantize: Quantize = field(default_factory=Quantize)
    gdn2: GDN2 = field(default_factory=GDN2)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
