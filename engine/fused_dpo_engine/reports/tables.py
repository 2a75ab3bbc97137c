"""Tables for the console."""

from rich.table import Table

from fused_dpo_engine.training.summary import Summary


def summary_table(summary: Summary, best_metric: str) -> Table:
    """Show held-out metrics before and after, and what the run took."""
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
        "fill": f"{summary.fill:.1%}",
        "padding": f"{summary.padding:.1%}",
        "saved by sharing": f"{summary.shared:.1%}",
        "peak memory": f"{summary.peak_memory_gib:.2f} GiB",
    }
    if summary.best_step is not None:
        run[f"best {best_metric}"] = f"{summary.best_value:.4f} (step {summary.best_step}, in best/)"
    table.add_section()
    for name, value in run.items():
        table.add_row(name, *([""] if summary.eval_after else []), value)
    return table
