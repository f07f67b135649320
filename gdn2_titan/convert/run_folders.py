"""Where in a run's folder a checkpoint lies. Without torch, so that a wrong path is answered at once."""

import os
import re
from pathlib import Path

from .errors import ConvertError

__all__ = ["INDEX", "SINGLE", "checkpoint_folder", "step_of"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_STEP = re.compile(r"step-(\d+)")


def step_of(folder: Path) -> int | None:
    """The training step that a folder is named after, or None."""
    found = _STEP.fullmatch(folder.absolute().name)
    return int(found.group(1)) if found else None


def _steps(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folder's checkpoints of steps: (all, those that are complete)."""
    try:
        steps = [step for step in folder.iterdir() if _STEP.fullmatch(step.name) and step.is_dir()]
    except OSError as error:
        raise ConvertError(f"{folder} cannot be read: {error.strerror}") from error
    return steps, [step for step in steps if any((step / name).is_file() for name in (".metadata", INDEX, SINGLE))]


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The folder with the tensors that ``path`` means: itself, or where it is a run's folder (``job.dump_folder``) or
    its folder of checkpoints, the latest complete step.

    Raises:
        ConvertError: there is no such folder, no checkpoint in it, or more than one folder of checkpoints.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConvertError(f"{path} is not there; it must be a folder with a checkpoint")
    files = (".metadata", "config.json", INDEX, SINGLE)
    if step_of(path) is not None or any((path / name).is_file() for name in files):
        return path
    folders = {path: _steps(path)}
    if not folders[path][0]:  # a run's folder: which of its folders has the checkpoints is the run's checkpoint.folder
        folders = {folder: _steps(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    found = {folder: max(complete, key=step_of) for folder, (_, complete) in folders.items() if complete}
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ConvertError(f"{path} has more than one folder of checkpoints: {names}; it must be one of them")
    if found:
        return found.popitem()[1]
    steps = [step for all_steps, _ in folders.values() for step in all_steps]
    if steps:
        names = ", ".join(str(step.relative_to(path)) for step in sorted(steps, key=step_of))
        raise ConvertError(f"{path} has no complete checkpoint: of {names} not all is there")
    raise ConvertError(
        f"{path} has no checkpoint; it must be a checkpoint (step-N), a folder of them, or a run's folder around that"
    )
