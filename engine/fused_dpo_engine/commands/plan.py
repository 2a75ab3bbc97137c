"""`fused-dpo plan` as a function: what the forward passes over a data set take."""

import dataclasses

from rich.console import Console

from fused_dpo_engine.config.commands import PlanConfig
from fused_dpo_engine.config.options import RunOptions
from fused_dpo_engine.data.load import load_pairs
from fused_dpo_engine.model.loading import choose_max_length, load_tokenizer
from fused_dpo_engine.reports.plan import report
from fused_dpo_engine.reports.rows import show_pairs


def plan(config: PlanConfig) -> None:
    """Print what the forward passes over a data set would be.

    Raises:
        UserError: settings or data cannot work.
    """
    console = Console(highlight=False)
    tokenizer = load_tokenizer(config.model_options.model, config.model_options)
    max_length = choose_max_length(config.model_options, config.data, config.packing)
    data = dataclasses.replace(config.data, max_length=max_length)
    pairs, _ = load_pairs(data, config.seed, tokenizer, console)
    run = RunOptions(output="", pairs_per_step=config.pairs_per_step, seed=config.seed)
    wide = console if console.is_terminal else Console(highlight=False, width=140)
    if config.show:
        wide.print(show_pairs(pairs[: config.show], tokenizer), soft_wrap=True)
    wide.print(report(pairs, run, config.packing))
