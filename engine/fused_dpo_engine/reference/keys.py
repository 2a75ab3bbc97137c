"""What identifies a log-prob: the sequence, and all that the number depends on. Nothing else is in its key."""

import struct
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import AutoModelForCausalLM

from fused_dpo_engine.attention.models import attention_for
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.model.fingerprint import fingerprint
from fused_dpo_engine.model.loading import choose_dtype
from fused_dpo_engine.model.source import Source, find_source, read_config

NUMERICS = 1
"""Raised by a release whose log-probs differ from those of the one before by more than rounding."""


def sequence_keys(pair: TokenPair, ld_alpha: float | None = None) -> tuple[bytes, bytes]:
    """Digest what is scored of a pair into 16 bytes a side: tokens, scored positions, and weights that are not 1.

    Under LD-DPO (`ld_alpha`) a longer response's tail counts less, and its key says from where on and how much.
    """
    chosen, rejected = pair.chosen_length, pair.rejected_length
    start = pair.prompt_length
    return (
        _key(pair.chosen_ids, pair.chosen_scored, start, rejected if chosen > rejected else None, ld_alpha),
        _key(pair.rejected_ids, pair.rejected_scored, start, chosen if rejected > chosen else None, ld_alpha),
    )


def _key(ids: np.ndarray, positions: np.ndarray | None, start: int, tail: int | None, ld_alpha: float | None) -> bytes:
    """Digest a sequence of which the scored tokens from `tail` on count `ld_alpha`.

    Positions that are all from the first on are said by that one, however the pair has them: `positions`, or None for
    all from `start` on.
    """
    listed = b""
    if positions is not None:
        start = int(positions[0])
        if len(positions) < len(ids) - start:
            listed = positions.astype("<i8", copy=False).tobytes()
    content = struct.pack("<qqq", len(ids), start, len(listed)) + ids.astype("<i4", copy=False).tobytes() + listed
    if tail is not None and ld_alpha not in (None, 1.0):
        content += struct.pack("<dq", ld_alpha, tail)
    return xxhash.xxh3_128_digest(content)


def scorer_settings(
    options: ModelOptions, lora: LoraOptions, device: torch.device, *, frozen: bool, packing: bool, strategy: str
) -> dict[str, Any]:
    """List what a model's log-probs depend on beside the sequence, from its files alone; readable as JSON.

    How pairs are put into forward passes, over how many processes, and in what order, is left out: it moves a log-prob
    by rounding alone. Adapters that the run adds are off in the reference, so that theirs is left out too.

    Args:
        options: of the model that scores, which `model` names.
        lora: adapters that are trained on it; none on a frozen model.
        device: that it computes on.
        frozen: it is a reference of its own, which is never compiled.
        packing: attention is the one that `attention` names, and not the model's own. In half precision the two round
            apart by up to a nat a sequence.
        strategy: see `choose_strategy`; FSDP2 rounds all weights of a layer to the compute dtype.

    Raises:
        UserError: there is no such model, or its files cannot be read.
    """
    source = find_source(options.model)
    config = read_config(source, options)
    dtype = choose_dtype(options, device)
    quantised = options.load_in_4bit or getattr(config, "quantization_config", None) is not None
    attached = source.adapters is not None and (lora.lora_rank > 0 or quantised)
    return {
        "numerics": NUMERICS,
        "model": fingerprint(options.model, trust_remote_code=options.trust_remote_code),
        "adapters": None if source.adapters is None else "attached" if attached else "merged",
        "dtype": _name(dtype),
        "weights": _name(dtype if lora.lora_rank else torch.float32),
        "weights_of_layers": _name(dtype if lora.lora_rank or strategy == "fsdp2" else torch.float32),
        "load_in_4bit": options.load_in_4bit,
        "device": device.type,
        "attention": _attention(source, config, options, device, dtype) if packing else _own_attention(dtype),
        "liger": options.liger,
        "compile": options.compile and not frozen,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _own_attention(dtype: torch.dtype) -> str:
    """Name the attention of padded batches; in fp32 it agrees with SDPA a segment to rounding."""
    return "own" if dtype.itemsize == 2 else "sdpa"


def _attention(source: Source, config: Any, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> str:
    """Name the backend that the model will take, without its weights."""
    if device.type != "cuda":
        return "sdpa"  # there is no other
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    return attention_for(model, device, dtype, options.attention)
