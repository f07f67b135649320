"""What TorchTitan 0.2.2 needs to know to train the model."""

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.protocols import train_spec as titan_specs

from ..dataloader import build_dataloader, for_trainer
from ..errors import refusing
from ..old_names import reading_old_names
from ..state_dict_adapter import GDN2StateDictAdapter
from ..tokens import check_tokenizer
from ..validate_config import check_vocabulary, validate_config
from .context import deal_out_resets
from .export import export_exact_decays
from .float8 import register_converters
from .loss import build_loss
from .lr_scheduler import build_lr_schedulers
from .metrics import build_metrics_processor
from .model import TitanModel
from .model_args import titan_flavors
from .optimizer import build_optimizers
from .parallelize import parallelize
from .parsing import check_parsed_configs
from .pipeline import pipeline
from .validator import build_validator

__all__ = ["get_train_spec", "register"]


@refusing
def _build_tokenizer(job_config):
    # The first thing that TorchTitan builds from a config: the place to refuse one that was parsed before this package
    # was imported.
    validate_config(job_config)
    check_tokenizer(job_config.model.hf_assets_path)
    tokenizer = HuggingFaceTokenizer(job_config.model.hf_assets_path)
    check_vocabulary(job_config, tokenizer)
    return tokenizer


def get_train_spec():
    return titan_specs.TrainSpec(
        model_cls=TitanModel,
        model_args=titan_flavors(),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=for_trainer(build_dataloader),
        build_tokenizer_fn=_build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=refusing(build_validator),
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=GDN2StateDictAdapter,
    )


def register(name="gdn2"):
    """Make the model known to TorchTitan as ``model.name = "gdn2"``. Once per process; again is harmless."""
    if name not in titan_specs._extra_train_specs:
        titan_specs.register_train_spec(name, get_train_spec())
    register_converters()
    check_parsed_configs()
    deal_out_resets()
    export_exact_decays()
    if not hasattr(CheckpointManager.dcp_load, "__wrapped__"):
        CheckpointManager.dcp_load = reading_old_names(CheckpointManager.dcp_load)
