"""A training run from settings to files: `fused-dpo train` as a function."""

import dataclasses
import gc
import json
from pathlib import Path

import torch
import transformers
from rich.console import Console

from fused_dpo.losses import loss_spec, needs_reference
from fused_dpo_engine.batching.planning import check_rankings
from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.config.paths import refuse_overlap
from fused_dpo_engine.data.load import load_pairs
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.loading import (
    check_model,
    choose_device,
    choose_dtype,
    choose_max_length,
    dtype_warning,
    load_tokenizer,
)
from fused_dpo_engine.model.parity import pairs_to_test, self_test
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.model.source import find_source
from fused_dpo_engine.reference.scoring import score_run
from fused_dpo_engine.reports.tables import summary_table
from fused_dpo_engine.training.memory import memory_warning
from fused_dpo_engine.training.optimizer import check_optimizer
from fused_dpo_engine.training.run_folder import check_output, open_output, write
from fused_dpo_engine.training.summary import Summary
from fused_dpo_engine.training.trackers import check_trackers
from fused_dpo_engine.training.trainer import Trainer


def train(config: TrainConfig) -> Summary:
    """Train as `config` says and write the run's folder.

    Everything that can be wrong with settings and data is found before a model is loaded.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: settings, data or model cannot work.
        TrainingDivergedError, SaveError: see `Trainer.train`.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.run.seed)
    device = choose_device(config.model)
    output = Path(config.run.output).expanduser()
    refuse_overlap(config.run.output, config.inputs)
    _check_models(config)
    check_output(output, config.run.overwrite)
    check_trackers(config.run.report_to)
    check_optimizer(config.optimizer)
    if warning := dtype_warning(config.model, device):
        console.print(warning)
    tokenizer = load_tokenizer(config.model.model, config.model)
    config = _resolved(config, device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if warning := memory_warning(config, total):
            console.print(warning)
    frozen = _reference_options(config)
    if frozen is not None:
        choose_max_length(frozen, config.data, config.packing)
    rankings = loss_spec(config.loss.loss_type).ranked
    pairs, held_out = load_pairs(config.data, config.run.seed, tokenizer, console, rankings=rankings)
    for side in (pairs, held_out):
        check_rankings(side, config.packing)
        _check_margins(side, config)
    schedule = Schedule(pairs, config.run, config.packing)
    _warn_of_passes(config, schedule, console)
    packing = config.packing
    reference = held_out_reference = None
    if frozen is not None:
        scorer = build_policy(
            frozen, LoraOptions(), device, ld_alpha=config.loss.ld_alpha, packing=packing.packing, trained=False
        )
        _check_vocabulary(scorer, pairs + held_out)
        reference, held_out_reference = score_run(scorer, schedule, held_out, console)
        del scorer
        gc.collect()  # the model and its modules refer to each other
    policy = build_policy(config.model, config.lora, device, ld_alpha=config.loss.ld_alpha, packing=packing.packing)
    _check_vocabulary(policy, pairs + held_out)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    console.print(
        f"model: {type(policy.causal_lm).__name__}, {trainable / 1e6:.1f} M trainable weights, {config.model.dtype} on "
        f"{device}, {_layout(config, policy)}, head {'triton' if device.type == 'cuda' else 'streaming'}"
    )
    for note in policy.notes:
        console.print(note)
    self_test(policy, [pairs[i] for i in pairs_to_test(pairs, packing)], packing)
    if config.model.compile:
        policy.compile_backbone()
    if reference is None and needs_reference(config.loss.loss_type):
        reference, held_out_reference = score_run(policy, schedule, held_out, console)

    open_output(output)  # not before everything that can be wrong has been found
    write(output / "config.json", config.as_json())
    trainer = Trainer(policy, config, tokenizer, schedule, reference, held_out, held_out_reference, output)
    try:
        summary = trainer.train()
    finally:
        write(output / "summary.json", json.dumps(trainer.summary.as_dict(), indent=2))
    console.print(summary_table(summary, config.run.best_metric))
    console.print(f"model: {output / 'model'}    metrics: {output / 'metrics.jsonl'}")
    return summary


def _check_models(config: TrainConfig) -> None:
    """Find out what can be wrong with the models without their weights; adapters name a folder that is read too."""
    source = check_model(config.model, config.lora, packing=config.packing.packing)
    frozen = _reference_options(config)
    bases = {"--model": source.base, "--ref-model": None if frozen is None else find_source(frozen.model).base}
    refuse_overlap(config.run.output, bases)


def _resolved(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Make every automatic choice in the settings."""
    max_length = choose_max_length(config.model, config.data, config.packing)
    dtype = "bfloat16" if choose_dtype(config.model, device) == torch.bfloat16 else "float32"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype, device=device.type),
        data=dataclasses.replace(config.data, max_length=max_length),
    )


def _warn_of_passes(config: TrainConfig, schedule: Schedule, console: Console) -> None:
    """Say so where a step's result depends on how it is split into forward passes."""
    loss_type = config.loss.loss_type
    if not loss_spec(loss_type).across_pairs:
        return
    if any(len(step.batches) > 1 for step in schedule.first_pass()):
        console.print(
            f"warning: {loss_type} compares the pairs of one forward pass with each other; --tokens-per-batch and "
            f"packing decide which those are"
        )


def _check_margins(pairs: list[TokenPair], config: TrainConfig) -> None:
    """Refuse an offset from scores where there are no scores."""
    if config.loss.odpo_alpha and pairs and not any(pair.margin for pair in pairs):
        raise UserError(
            "odpo-alpha is an offset by the difference of two answers' scores, and no pair has any; leave it out, or "
            "name the columns of the scores as docs/data.md has them."
        )


def _reference_options(config: TrainConfig) -> ModelOptions | None:
    """Tell how to load the reference, if it is a model of its own."""
    if not config.model.ref_model:
        return None
    return dataclasses.replace(config.model, model=config.model.ref_model)


def _layout(config: TrainConfig, policy: Policy) -> str:
    if not config.packing.packing:
        return f"padded batches, attention {policy.causal_lm.config._attn_implementation}"
    shared = "prefixes shared" if config.packing.prefix_sharing else "prefixes not shared"
    return f"packed, {shared}, attention {policy.attention_name}"


def _check_vocabulary(policy: Policy, pairs: list[TokenPair]) -> None:
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for pair in pairs:
        largest = max(int(pair.chosen_ids.max()), int(pair.rejected_ids.max()))
        if largest >= size:
            raise UserError(
                f"{pair.where}: token id {largest} lies outside the model's {size} embeddings; the tokenizer does not "
                f"belong to this model."
            )
