"""Model folders in Hugging Face format, complete or not there at all, beside files of other people."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.checkpoint.files import sync, sync_all
from fused_dpo_engine.errors import SaveError

MANIFEST = ".fused-dpo-files.json"
"""In a model folder: names of the files that were saved there, itself left out."""


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Save weights (safetensors), configuration and tokenizer; replaces what an earlier call has saved in `folder`.

    Written beside it first, and to the disk: an interruption leaves the old folder or the new one, never half of one (a
    kill between the two renames leaves the old one beside it, for `recover_model`). Files that no call has saved stay,
    unless a new one has their name. A model with adapters saves these alone, as peft does. `weights` are taken in the
    place of the model's own, of which it may hold a share.

    Raises:
        SaveError: the system refuses; `folder` is as it was.
    """
    recover_model(folder)
    fresh, old = _beside(folder)
    try:
        model.save_pretrained(fresh, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(fresh)
        (fresh / MANIFEST).write_text(json.dumps(sorted(files_in(fresh)), indent=1) + "\n", encoding="utf-8")
        for name in files_in(folder) - saved_in(folder) - files_in(fresh):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, fresh / name)
        sync_all(fresh)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise SaveError(folder, error) from error
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_model(folder: Path) -> None:
    """Give a folder that a killed `save_model` has moved out of the way its name back, and remove what else it left."""
    fresh, old = _beside(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Name the folders that are written beside one: the new one, and the old one out of the way."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def remove_model(folder: Path) -> None:
    """Remove the files that `save_model` has saved in a folder, and the folder if nothing else is in it."""
    for name in saved_in(folder):
        (folder / name).unlink(missing_ok=True)
    if saved_in(folder) or (folder / MANIFEST).is_file():
        (folder / MANIFEST).unlink()
    if folder.is_dir() and not files_in(folder):
        shutil.rmtree(folder)


def saved_in(folder: Path) -> set[str]:
    """List the files that `save_model` has saved in a folder and that are still there."""
    try:
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return files_in(folder) & {*names, MANIFEST} if isinstance(names, list) else set()


def files_in(folder: Path) -> set[str]:
    """List all files below a folder by their relative paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
