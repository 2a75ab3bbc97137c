"""Model folders in Hugging Face format, complete or not there at all."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights (safetensors), configuration and tokenizer, replacing what was in `folder`.

    Written beside it first: an interruption leaves the old folder or the new one, never half of one (a kill between the
    two renames leaves both beside it, as `.NAME.old` and `.NAME.new`). A model with adapters saves these alone, as peft
    does.
    """
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
