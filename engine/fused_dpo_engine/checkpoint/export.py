"""Model folders in Hugging Face format, complete or not there at all, beside files of other people."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.errors import SaveError

MANIFEST = ".fused-dpo-files.json"
"""In a model folder: names of the files that were saved there, itself left out."""


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Save weights (safetensors), configuration and tokenizer; replaces what an earlier call has saved in `folder`.

    Written beside it first: an interruption leaves the old folder or the new one, never half of one (a kill between the
    two renames leaves both beside it, as `.NAME.old` and `.NAME.new`). Files that no call has saved stay, unless a new
    one has their name. A model with adapters saves these alone, as peft does. `weights` are taken in the place of the
    model's own, of which it may hold a share.

    Raises:
        SaveError: the system refuses; `folder` is as it was.
    """
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(fresh, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(fresh)
        (fresh / MANIFEST).write_text(json.dumps(sorted(files_in(fresh)), indent=1) + "\n", encoding="utf-8")
        for name in files_in(folder) - saved_in(folder) - files_in(fresh):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, fresh / name)
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
    shutil.rmtree(old, ignore_errors=True)


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
