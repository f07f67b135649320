"""What is said at the end of a run: whether it trained, and the commands that one wants next, with its paths."""

import os
import shlex
import sys
from pathlib import Path

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.run_folders import checkpoint_folder, step_of

from .settings import Settings

__all__ = ["nothing_to_train", "what_next"]


def _latest(settings: Settings) -> Path | None:
    """The folder of the run's latest complete checkpoint, or None."""
    if not settings.checkpoint.enable:
        return None
    try:
        return checkpoint_folder(Path(settings.job.dump_folder, settings.checkpoint.folder))
    except ConvertError:
        return None


def nothing_to_train(settings: Settings) -> str | None:
    """The sentence about a run that had reached its last step before it was started, or None."""
    steps, latest = settings.training.steps, _latest(settings)
    if latest is None or settings.checkpoint.create_seed_checkpoint or (step_of(latest) or 0) < steps:
        return None
    return (
        f"Nothing to train: {settings.job.dump_folder} is at step {step_of(latest)} of {steps} already; a greater "
        "--training.steps continues it, another --job.dump_folder starts afresh"
    )


def what_next(settings: Settings) -> str:
    """Lines with commands to look at the curves, to generate text and to convert, each where the run left what it
    needs; "" if it left nothing."""
    run, commands = settings.job.dump_folder, []
    if settings.metrics.enable_tensorboard:
        commands.append(["-m", "tensorboard.main", "--logdir", os.path.join(run, settings.metrics.save_tb_folder)])
    if (latest := _latest(settings)) is not None:
        commands.append(["-m", "gdn2_titan.generate", "--model", str(latest), "--prompt", "import os"])
        if not (latest / "config.json").is_file():  # else it is a Hugging Face folder
            commands.append(["-m", "gdn2_titan.convert", "to-hf", str(latest), os.path.join(run, "hf")])
    if not commands:
        return ""
    return "Next:" + "".join(f"\n    {shlex.join([_python(), *words])}" for words in commands)


def _python() -> str:
    """The running Python, from here if it is below here."""
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith(os.pardir) else here
