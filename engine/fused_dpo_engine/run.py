"""A training run from settings to files: `fused-dpo train` as a function."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from fused_dpo.losses import needs_reference
from fused_dpo_engine.config import LoraOptions, TrainConfig
from fused_dpo_engine.data import read_rows
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.packing import pack, pack_all
from fused_dpo_engine.pairs import TokenizedPairs, TokenPair, split_pairs
from fused_dpo_engine.policy import Policy, build_policy, choose_device, choose_dtype, load_tokenizer
from fused_dpo_engine.reference import ReferenceLogps, score_reference
from fused_dpo_engine.tokenization import tokenize_pairs
from fused_dpo_engine.trainer import Summary, Trainer, first_pass

RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "tensorboard", "model", "best")


def train(config: TrainConfig) -> Summary:
    """Train as `config` says and write the run's folder.

    Everything that can be wrong with settings and data is found before a model is loaded.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: settings, data or model cannot work.
        TrainingDivergedError: see `Trainer.train`.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.run.seed)
    device = choose_device(config.model)
    output = Path(config.run.output).expanduser()
    _check_output(output, config.run.overwrite)
    tokenizer = load_tokenizer(config.model.model, config.model)
    config = _resolved(config, device)
    pairs, held_out = _load_pairs(config, tokenizer, console)

    reference = held_out_reference = None
    if config.model.ref_model and needs_reference(config.loss.loss_type):
        frozen = dataclasses.replace(config.model, model=config.model.ref_model)
        scorer = build_policy(frozen, LoraOptions(), device, ld_alpha=config.loss.ld_alpha)
        _check_vocabulary(scorer, pairs + held_out)
        reference, held_out_reference = _score(config, scorer, pairs, held_out, console)
        del scorer
        gc.collect()  # the model and its modules refer to each other
    policy = build_policy(config.model, config.lora, device, ld_alpha=config.loss.ld_alpha)
    _check_vocabulary(policy, pairs + held_out)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    console.print(
        f"model: {type(policy.causal_lm).__name__}, {trainable / 1e6:.1f} M trainable weights, {config.model.dtype} on "
        f"{device}, attention packed (SDPA a segment), head {'triton' if device.type == 'cuda' else 'streaming'}"
    )
    shortest = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids))
    policy.self_test(pack(pairs, shortest[:2]).to(device))
    if reference is None and needs_reference(config.loss.loss_type):
        reference, held_out_reference = _score(config, policy, pairs, held_out, console)

    _open_output(output)  # not before everything that can be wrong has been found
    config.save(output / "config.json")
    trainer = Trainer(policy, config, tokenizer, pairs, reference, held_out, held_out_reference, output)
    try:
        summary = trainer.train()
    finally:
        (output / "summary.json").write_text(json.dumps(trainer.summary.as_dict(), indent=2) + "\n", encoding="utf-8")
    console.print(summary_table(summary, config.run.best_metric))
    console.print(f"model: {output / 'model'}    metrics: {output / 'metrics.jsonl'}")
    return summary


def _check_output(output: Path, overwrite: bool) -> None:
    for folder in (output, *output.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {output}: {folder} is a file; give a folder.")
    there = [name for name in RUN_FILES if (output / name).exists()]
    if there and not overwrite:
        raise UserError(f"{output} already holds a run ({', '.join(there)}); choose another --output or --overwrite.")


def _open_output(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _resolved(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The settings with every automatic choice made."""
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            config.model.model, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"no model configuration could be read from {config.model.model}: {error}") from error
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None) or config.run.tokens_per_batch
    max_length = config.data.max_length or min(config.run.tokens_per_batch // 2, longest)
    if max_length > longest:
        raise UserError(f"max-length {max_length} exceeds the {longest} positions that {config.model.model} has.")
    dtype = "bfloat16" if choose_dtype(config.model, device) == torch.bfloat16 else "float32"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype, device=device.type),
        data=dataclasses.replace(config.data, max_length=max_length),
    )


def _load_pairs(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Training and held-out pairs."""
    data = config.data
    template = None
    if data.chat_template:
        if not Path(data.chat_template).is_file():
            raise UserError(f"--chat-template {data.chat_template}: no such file.")
        try:
            template = Path(data.chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--chat-template {data.chat_template} is no UTF-8 text: {error}") from error

    def load(source: str, split: str, kind: str) -> list[TokenPair]:
        tokenized: TokenizedPairs = tokenize_pairs(
            read_rows(source, split),
            tokenizer,
            max_length=data.max_length or 0,
            truncate_prompts=data.truncate_prompts,
            skip_bad_rows=data.skip_bad_rows,
            chat_template=template,
            progress=console.is_terminal,
        )
        console.print(f"{kind} data {source}: {tokenized.report.summary()}")
        return tokenized.pairs

    pairs = load(data.data, data.split, "training")
    if data.eval_data:
        return pairs, load(data.eval_data, data.eval_split, "held-out")
    if data.eval_fraction:
        pairs, held_out = split_pairs(pairs, data.eval_fraction, config.run.seed)
        console.print(f"held out: {len(held_out)} of {len(pairs) + len(held_out)} pairs")
        return pairs, held_out
    return pairs, []


def _score(
    config: TrainConfig, policy: Policy, pairs: list[TokenPair], held_out: list[TokenPair], console: Console
) -> tuple[ReferenceLogps, ReferenceLogps]:
    """Reference log-probs of all pairs that the run will see."""
    batches, count = first_pass(config, pairs)
    reference = score_reference(policy, pairs, batches, count, console.is_terminal)
    held_out_batches = pack_all(held_out, range(len(held_out)), config.run.tokens_per_batch)
    return reference, score_reference(policy, held_out, held_out_batches, len(held_out), console.is_terminal)


def _check_vocabulary(policy: Policy, pairs: list[TokenPair]) -> None:
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for pair in pairs:
        largest = max(int(pair.chosen_ids.max()), int(pair.rejected_ids.max()))
        if largest >= size:
            raise UserError(
                f"{pair.where}: token id {largest} lies outside the model's {size} embeddings; the tokenizer does not "
                f"belong to this model."
            )


def summary_table(summary: Summary, best_metric: str) -> Table:
    """Held-out metrics before and after, and what the run took."""
    table = Table(title=f"{summary.steps} of {summary.planned_steps} steps")
    table.add_column("held-out" if summary.eval_after else "run")
    if summary.eval_after:
        table.add_column("before", justify="right")
    table.add_column("after" if summary.eval_after else "", justify="right")
    for name, after in summary.eval_after.items():
        table.add_row(name.removeprefix("eval_"), f"{summary.eval_before[name]:.4f}", f"{after:.4f}")
    run = {
        "stopped": summary.stopped,
        "pairs": f"{summary.pairs}",
        "tokens": f"{summary.tokens}",
        "seconds": f"{summary.seconds:.1f}",
        "tokens/s": f"{summary.tokens_per_second:.0f}",
        "peak memory": f"{summary.peak_memory_gib:.2f} GiB",
    }
    if summary.best_step is not None:
        run[f"best {best_metric}"] = f"{summary.best_value:.4f} (step {summary.best_step}, in best/)"
    table.add_section()
    for name, value in run.items():
        table.add_row(name, *([""] if summary.eval_after else []), value)
    return table
