"""A training run from settings to files: `fused-dpo train` as a function."""

import dataclasses
import gc
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from fused_dpo.losses import loss_spec
from fused_dpo_engine.batching.planning import check_rankings
from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.checkpoint.files import write
from fused_dpo_engine.checkpoint.folder import Checkpoints
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.config.paths import refuse_overlap
from fused_dpo_engine.data.load import check_same_everywhere, load_pairs
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.failures import processes
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.distributed.strategy import choose_strategy
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.layers import decoder_layers
from fused_dpo_engine.model.loading import (
    check_model,
    choose_device,
    choose_dtype,
    choose_max_length,
    dtype_warning,
    load_tokenizer,
)
from fused_dpo_engine.model.parallel import share_out
from fused_dpo_engine.model.parity import check_vocabulary, pairs_to_test, self_test
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.model.source import find_source
from fused_dpo_engine.model.tensor_parallel import check_tensor_parallel
from fused_dpo_engine.reference.run import find_references
from fused_dpo_engine.reports.tables import summary_table
from fused_dpo_engine.training.memory import fits, memory_warning
from fused_dpo_engine.training.optimizer import check_optimizer
from fused_dpo_engine.training.resume import check_same_run, find_checkpoint, finished, identify
from fused_dpo_engine.training.run_folder import CONFIG, SUMMARY, open_output, reopen_output
from fused_dpo_engine.training.state import read_reference
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
    parallel = config.parallel
    joined = processes(parallel.tensor_parallel, parallel.timeout_minutes, alone=parallel.offload)
    with joined as ranks, warnings.catch_warnings():
        if not ranks.is_main:  # the main one has the same to say
            warnings.simplefilter("ignore")
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> Summary:
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not ranks.is_main)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.run.seed)
    ranks, device = ranks.use(choose_device(config.model))
    output = Path(config.run.output).expanduser()
    refuse_overlap(config.run.output, config.inputs)
    _check_models(config)
    checkpoint = find_checkpoint(config.run, output, ranks, console.print)
    if ranks.is_main:
        check_trackers(config.run.report_to)
    check_optimizer(config.optimizer)
    if warning := dtype_warning(config.model, device):
        console.print(warning)
    tokenizer = load_tokenizer(config.model.model, config.model)
    config = _resolved(config, device)
    if (summary := finished(config, output, ranks)) is not None:
        console.print(f"{output} holds a run that has come to its end: nothing is left to do")
        return summary
    strategy_name = choose_strategy(
        config.parallel.strategy,
        ranks,
        offload=config.parallel.offload,
        whole_fits=partial(fits, config, device),
    )
    shared: dict[str, Any] = {"strategy": "fsdp2", "gpus": ranks.data_size, "offload": config.parallel.offload}
    reduces_every_pass = strategy_name == "fsdp2" and (
        config.parallel.offload or not fits(config, device, **shared, reduces_every_pass=False)
    )
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        how = {**shared, "reduces_every_pass": reduces_every_pass} if strategy_name == "fsdp2" else {}
        if warning := memory_warning(config, total, **how):
            console.print(warning)
    frozen = _reference_options(config)
    if frozen is not None:
        choose_max_length(frozen, config.data, config.packing)
    rankings = loss_spec(config.loss.loss_type).ranked
    pairs, held_out = load_pairs(config.data, config.run.seed, tokenizer, console, rankings=rankings)
    for side in (pairs, held_out):
        check_rankings(side, config.packing)
        _check_margins(side, config)
    _check_held_alike(f"{strategy_name} {reduces_every_pass}", ranks)
    check_same_everywhere(config.as_json(), pairs + held_out, ranks)
    keeps = config.run.checkpoint_every > 0 or config.run.checkpoint_minutes > 0
    identity = identify(config, pairs, held_out, ranks) if keeps or checkpoint is not None else {}
    if checkpoint is not None:
        check_same_run(checkpoint, config, identity, ranks, console.print)
    schedule = Schedule(pairs, config.run, config.packing, num_ranks=ranks.data_size, rank=ranks.data_rank)
    _warn_of_passes(config, schedule, console)
    packing = config.packing
    references = None  # a checkpoint has them
    if checkpoint is None:
        references = find_references(config, frozen, device, strategy_name, schedule, held_out, console, ranks)
    hold = partial(
        share_out,
        strategy=strategy_name,
        ranks=ranks,
        device=device,
        offload=config.parallel.offload,
        reduces_every_pass=reduces_every_pass,
    )
    # Shares alone reach the device, so that a model may be larger than it is.
    in_parts = strategy_name == "fsdp2" or ranks.tensor_parallel > 1
    loaded_on = torch.device("cpu") if in_parts else device
    load = partial(
        build_policy, device=device, ld_alpha=config.loss.ld_alpha, packing=packing.packing, loaded_on=loaded_on
    )
    if frozen is not None and references is not None and not references.needs_model:
        references.say_not_loaded()
    elif frozen is not None and references is not None:
        scorer = load(frozen, LoraOptions(), trained=False)
        check_vocabulary(scorer, pairs + held_out)
        if in_parts:
            hold(scorer)
        references.score(scorer)
        del scorer
        gc.collect()  # the model and its modules refer to each other
    policy = load(config.model, config.lora)
    check_vocabulary(policy, pairs + held_out)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    console.print(
        f"model: {type(policy.causal_lm).__name__}, {trainable / 1e6:.1f} M trainable weights, {config.model.dtype} on "
        f"{device.type}, {_layout(config, policy)}, head {'triton' if device.type == 'cuda' else 'streaming'}"
    )
    for note in policy.notes:
        console.print(note)
    strategy = hold(policy)
    self_test(policy, [pairs[i] for i in pairs_to_test(pairs, packing)], packing, strategy.gathered())
    if config.model.compile:
        policy.compile_backbone(layers=list(decoder_layers(policy.causal_lm)) if strategy_name == "fsdp2" else ())
    if ranks.size > 1:
        console.print(f"{ranks.size} processes, {strategy.name}")
    if frozen is None and references is not None:
        references.score(policy, beta=config.loss.beta if config.loss.loss_type == "sigmoid" else None)
    reference, held_out_reference = (None, None) if references is None else references.finish()
    if checkpoint is not None:
        reference = read_reference(checkpoint, "pairs", len(pairs), ranks)
        held_out_reference = read_reference(checkpoint, "held-out pairs", len(held_out), ranks)

    trainer = Trainer(
        policy,
        strategy,
        ranks,
        config,
        tokenizer,
        schedule,
        reference,
        held_out,
        held_out_reference,
        output,
        Checkpoints(output, config.run.checkpoints_kept, ranks) if keeps else None,
        identity,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if ranks.is_main:  # not before everything that can be wrong has been found
        warning = open_output(output) if checkpoint is None else reopen_output(output, checkpoint)
        if warning:
            console.print(warning)
        # As settings of another run it is to begin that one.
        settings = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="never"))
        write(output / CONFIG, settings.as_json())
    try:
        summary = trainer.train()
    finally:
        if ranks.is_main:
            write(output / SUMMARY, json.dumps(trainer.summary.as_dict(), indent=2))
    console.print(summary_table(summary, config.run.best_metric))
    console.print(f"model: {output / 'model'}    metrics: {output / 'metrics.jsonl'}")
    return summary


def _check_models(config: TrainConfig) -> None:
    """Find out what can be wrong with the models without their weights; adapters name a folder that is read too."""
    source = check_model(config.model, config.lora, packing=config.packing.packing)
    frozen = _reference_options(config)
    if (ranks := config.parallel.tensor_parallel) > 1:
        for options in filter(None, (config.model, frozen)):
            check_tensor_parallel(options, config.lora, ranks)
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


def _check_held_alike(held: str, ranks: Ranks) -> None:
    """Refuse processes that hold the model in different ways; each chooses by the memory of its own device."""
    if len(set(ranks.gather_objects(held))) > 1:
        raise UserError(
            "the processes choose different ways to hold the model, as their devices have different memory; give "
            "--strategy ddp, or --strategy fsdp2 with --offload."
        )


def _warn_of_passes(config: TrainConfig, schedule: Schedule, console: Console) -> None:
    """Say so where a step's result depends on how it is split into forward passes."""
    loss_type = config.loss.loss_type
    if not loss_spec(loss_type).across_pairs:
        return
    if any(len(step.batches) * schedule.num_ranks > 1 for step in schedule.first_pass()):
        console.print(
            f"warning: {loss_type} compares the pairs of one forward pass with each other; --tokens-per-batch and "
            f"packing decide which those are, and so does the number of processes"
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
