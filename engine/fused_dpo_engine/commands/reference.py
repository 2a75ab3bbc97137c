"""`fused-dpo reference` as a function: a reference store filled, tried, and exported, without a run."""

import dataclasses
import warnings

import torch
import transformers
from rich.console import Console

from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.commands import ReferenceConfig
from fused_dpo_engine.config.options import RunOptions
from fused_dpo_engine.data.load import check_same_everywhere, load_pairs
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.failures import processes
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.distributed.strategy import choose_strategy
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.layers import decoder_layers
from fused_dpo_engine.model.loading import choose_device, choose_max_length, dtype_warning, load_tokenizer
from fused_dpo_engine.model.parallel import share_out
from fused_dpo_engine.model.parity import check_vocabulary, pairs_to_test, self_test
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.reference.compare import verify
from fused_dpo_engine.reference.export import check_export, export
from fused_dpo_engine.reference.kept import Kept
from fused_dpo_engine.reference.keys import scorer_settings
from fused_dpo_engine.reference.run import RunReference


def reference(config: ReferenceConfig) -> None:
    """Score the pairs that a store lacks, and write them into it; then verify and export, if that is asked for.

    Raises:
        UserError: settings, data or model cannot work, or stored log-probs are not those of the model.
        SaveError: the store or the export could not be written.
    """
    parallel = config.parallel
    joined = processes(parallel.tensor_parallel, parallel.timeout_minutes, alone=parallel.offload)
    with joined as ranks, warnings.catch_warnings():
        if not ranks.is_main:  # the main one has the same to say
            warnings.simplefilter("ignore")
        _reference(config, ranks)


def _reference(config: ReferenceConfig, ranks: Ranks) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not ranks.is_main)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    ranks, device = ranks.use(choose_device(config.model))
    if config.export is not None:
        check_export(config.export, [config.data.data, config.data.eval_data, config.store], config.overwrite)
    if warning := dtype_warning(config.model, device):
        console.print(warning)
    strategy = choose_strategy(
        config.parallel.strategy, ranks, offload=config.parallel.offload, whole_fits=lambda: True
    )
    tokenizer = load_tokenizer(config.model.model, config.model)
    max_length = choose_max_length(config.model, config.data, config.packing)
    choose_max_length(config.scored, dataclasses.replace(config.data, max_length=max_length), config.packing)
    data = dataclasses.replace(config.data, max_length=max_length)
    pairs, held_out = load_pairs(data, config.seed, tokenizer, console)
    every = pairs + held_out
    check_same_everywhere(repr(config), every, ranks)
    schedule = Schedule([], RunOptions(output="", seed=config.seed), config.packing, **_share(ranks))
    kept = _open(config, device, strategy, ranks, console)
    known = RunReference(schedule, every, kept, console, ranks, take_brought=False)
    policy: Policy | None = None
    if known.needs_model or config.verify:
        policy = _load(config, device, strategy, ranks, every)
        known.score(policy)
    logps = known.held_out.logps
    if config.verify and policy is not None:
        stored = kept.look_up(every)
        console.print(verify(policy, every, stored, config.packing, config.verify, config.seed))
    known.finish()
    if config.export is not None and ranks.is_main:
        of_data = pairs if config.data.eval_data else every
        count = len(of_data)
        console.print(export(config.export, config.data, of_data, logps[:count]))


def _share(ranks: Ranks) -> dict[str, int]:
    return {"num_ranks": ranks.data_size, "rank": ranks.data_rank}


def _open(config: ReferenceConfig, device: torch.device, strategy: str, ranks: Ranks, console: Console) -> Kept:
    frozen = config.model.ref_model is not None

    def settings() -> dict[str, object]:
        return scorer_settings(
            config.scored, config.lora, device, frozen=frozen, packing=config.packing.packing, strategy=strategy
        )

    return Kept(config.store, settings, config.ld_alpha, ranks, console, strict=True)


def _load(config: ReferenceConfig, device: torch.device, strategy: str, ranks: Ranks, pairs: list[TokenPair]) -> Policy:
    """Load the model that scores as a run of the same settings does, and compare it with its own forward."""
    frozen = config.model.ref_model is not None
    in_parts = strategy == "fsdp2" or ranks.tensor_parallel > 1
    policy = build_policy(
        config.scored,
        config.lora,
        device,
        ld_alpha=config.ld_alpha,
        packing=config.packing.packing,
        trained=not frozen,
        loaded_on=torch.device("cpu") if in_parts else device,
    )
    check_vocabulary(policy, pairs)
    held = share_out(policy, strategy, ranks, device, offload=config.parallel.offload, reduces_every_pass=True)
    self_test(policy, [pairs[i] for i in pairs_to_test(pairs, config.packing)], config.packing, held.gathered())
    if config.model.compile and not frozen:
        policy.compile_backbone(layers=list(decoder_layers(policy.causal_lm)) if strategy == "fsdp2" else ())
    return policy
