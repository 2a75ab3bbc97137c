"""TRL's DPOTrainer, from 1.15 on: its log-probs, and those of its reference, by the fused head.

TRL gives the models of a trainer a forward that returns log-probs (`add_fused_lm_head`) and reads nothing else of them:
loss, metrics, reference, evaluation and stored reference log-probs all take what it returns. So that forward is what is
replaced, in the module of `DPOTrainer` alone: other trainers, which import the same function, keep theirs.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fused_dpo.integrations.model_forward import SCORER, named, replace_forward
from fused_dpo.integrations.patching import Patch, release_of
from fused_dpo.integrations.router_loss import load_balancing_loss
from fused_dpo.integrations.scoring import IGNORE_INDEX, Counts, Scorer
from fused_dpo.integrations.trl_legacy import patch_legacy
from fused_dpo.models.parts import causal_model
from fused_dpo.options import KernelOptions
from fused_dpo.version import VERSION

_STATS = {
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}
"""TRL's names of what it asks for beside the log-probs, and ours."""
_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
"""Of `add_fused_lm_head` in 1.15 and 1.16."""


def patch_trl(packed: bool = True, *, grad_mode: str | None = None, options: KernelOptions | None = None) -> Patch:
    """Let TRL's DPOTrainer compute its log-probs by fused_dpo, from here on or within a `with` block.

    Trainers that are built under the patch keep it for life; build them after the call. Their losses, metrics,
    callbacks and files are TRL's. Beside the speed and memory of it, LoRA on the head works, which TRL refuses.

    Args:
        packed: lay the sequences of a batch into one row without padding, and compute once what they share. Needs a
            model that takes its attention through transformers' interface; it gets `attn_implementation="fused_dpo"`,
            which without packed rows (generation, `compute_metrics`) computes what SDPA does. Batches with images or
            embeddings are computed as they come, with a warning.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.

    Returns:
        What undoes it, and counts: `patch.undo()`, `patch.counts.packed_calls`, `patch.counts.slots`.

    Raises:
        ImportError: TRL is not installed.
        NotImplementedError: this version of TRL is not known, or has nothing to take the place of.
        RuntimeError: it is patched already. Training with a trainer that was built before the patch is one too.

    Numerics:
        In fp32 weights after five steps agree with TRL's to 5e-5 of their size (docs/drop-in.md). In half precision
        ours are the more accurate: TRL rounds logits to the dtype of the head. Stored reference log-probs
        (`precompute_ref_log_probs`) are told apart: those that TRL computed are not taken for ours.
    """
    settings = {"packed": packed, "grad_mode": grad_mode, "options": options}
    version = _version()
    if release_of(version) < (0, 29):
        return patch_legacy(version, **settings)
    dpo_trainer = _known_module(version)
    counts = Counts()
    signature = f"fused_dpo {VERSION} {options or KernelOptions()} {grad_mode} packed={packed}"

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        if cast_lm_head_to_fp32:
            raise NotImplementedError("cast_lm_head_to_fp32 is not known to DPOTrainer, and not to patch_trl.")
        scorer = Scorer(counts=counts, temperature=temperature, **settings)
        replace_forward(model, scorer, functools.partial(_forward, scorer, outputs))

    trainer = dpo_trainer.DPOTrainer
    replacements: list[tuple[Any, str, Any]] = [
        (dpo_trainer, "add_fused_lm_head", add_fused_lm_head),
        # A store of reference log-probs is found by this hash: of the weights, and now of who computed with them.
        (dpo_trainer, "hash_module", _signed(dpo_trainer.hash_module, signature)),
        (trainer, "_compute_loss", _checked(trainer._compute_loss)),
        (trainer, "compute_ref_log_probs", _checked(trainer.compute_ref_log_probs)),
    ]
    if hasattr(dpo_trainer, "BaseTunerLayer"):  # of peft's, to refuse adapters on the head, which the fused head reads
        replacements.append((dpo_trainer, "BaseTunerLayer", type("NoAdapterIsRefused", (), {})))
    return Patch("trl", replacements, counts)


def _version() -> str:
    try:
        import trl
    except ImportError as error:
        raise ImportError("patch_trl needs the package trl, which is not installed.") from error
    return trl.__version__


def _known_module(version: str) -> Any:
    """Import the module of `DPOTrainer`, and refuse releases in which it is not what is known."""
    if release_of(version) < (1, 15):
        raise NotImplementedError(
            f"TRL {version} computes DPO's log-probs and metrics from full logits in the middle of its loss, so there "
            f"is no place to put fused ones; pip install 'trl>=1.15,<1.17', or 'trl<=0.28'."
        )
    module: Any = importlib.import_module("trl.trainer.dpo_trainer")
    known = tuple(inspect.signature(module.add_fused_lm_head).parameters)
    if release_of(version) >= (1, 17) or known[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise NotImplementedError(
            f"TRL {version} is not known to work with fused_dpo {VERSION}; pip install 'trl>=1.15,<1.17', or a newer "
            f"fused_dpo."
        )
    return module


def _signed(hash_module: Callable[[Any], str], signature: str) -> Callable[[Any], str]:
    @functools.wraps(hash_module)
    def signed(module: Any) -> str:
        return f"{hash_module(module)} {signature}"

    return signed


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to compute by a trainer whose models have TRL's own head, as they were built before the patch."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = causal_model(self.accelerator.unwrap_model(self.model))
        if SCORER not in vars(model):
            raise RuntimeError(
                "this DPOTrainer was built before patch_trl(), so it would go on with TRL's own head; call patch_trl() "
                "first, then build the trainer."
            )
        return method(self, *args, **kwargs)

    return checked


def _forward(
    scorer: Scorer,
    outputs: tuple[str, ...],
    model: Any,
    original: Callable[..., Any],
    *args: Any,
    fused_lm_head: bool = False,
    labels: Any = None,
    shift_labels: Any = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    """Answer as TRL's own fused forward does; without its flag, as the model does."""
    asked = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
    if not fused_lm_head:
        return original(*args, **kwargs, **{name: value for name, value in asked.items() if value is not None})
    inputs = named(model, args, kwargs)
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    shift = shift_labels is None
    wanted = labels if shift else shift_labels
    stats = tuple(_STATS[name] for name in outputs if name in _STATS)
    scored = scorer.score(model, inputs, wanted, shift=shift, with_stats=stats)
    width = wanted.shape[1] - 1 if shift else wanted.shape[1]
    log_probs = scored.tokens.logps[:, :width].contiguous()  # FSDP2 warns of views
    fields = {name: getattr(scored.tokens, ours) for name, ours in _STATS.items()}
    mask = (wanted[:, 1:] if shift else wanted) != IGNORE_INDEX
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -log_probs.sum() / count
    mask_of_tokens = inputs.get("attention_mask")
    aux_loss = load_balancing_loss(model, scored, mask_of_tokens) if inputs.get("output_router_logits") else None
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    output_type: Any = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput
    tokens = {name: None if values is None else values[:, :width].contiguous() for name, values in fields.items()}
    return output_type(loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=aux_loss, **tokens)
