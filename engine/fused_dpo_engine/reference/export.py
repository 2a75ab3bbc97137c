"""A data set with the reference's log-probs as columns, under TRL's names, for whoever trains on it elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_dpo_engine.checkpoint.files import sync
from fused_dpo_engine.config.options import DataOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.references import COLUMNS
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.errors import SaveError, UserError, first_line

CHOSEN, REJECTED = COLUMNS[0]


def check_export(path: str, inputs: Sequence[str | None], overwrite: bool) -> None:
    """Find out, before anything is scored, whether a file may be written.

    Raises:
        UserError: it is there already and `overwrite` is False; it is one of the inputs, or a folder; or there is no
            folder for it.
    """
    file = Path(path)
    if not file.absolute().parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {file.absolute().parent}; make it first.")
    if file.is_dir():
        raise UserError(f"--export {path} is a folder; name a file.")
    if any(name and Path(name).expanduser().resolve() == file.resolve() for name in inputs):
        raise UserError(f"--export {path} is a file that is read; give another name.")
    if file.exists() and not overwrite:
        raise UserError(f"--export {path} is there already; give another name, or --overwrite.")


def export(path: str, data: DataOptions, pairs: Sequence[TokenPair], logps: Tensor) -> str:
    """Write the rows of `data` that pairs came from, in their order and with all their columns, and two more.

    Args:
        path: ends in .jsonl or .parquet.
        data: where the rows are read from.
        pairs: of these rows.
        logps: fp32 [pairs, 2].

    Returns:
        A line on what was written.

    Raises:
        UserError: a row with more than two answers, or values that the format cannot hold.
        SaveError: the system refuses; what was there before still is.
    """
    by_row: dict[str, tuple[float, float]] = {}
    for pair, (chosen, rejected) in zip(pairs, logps.tolist(), strict=True):
        if pair.where in by_row:
            raise UserError(
                f"--export: {pair.where} has more than two answers, for which there are no columns; leave such rows "
                f"out of the data, or leave --export out: the store has their log-probs all the same."
            )
        by_row[pair.where] = (chosen, rejected)
    rows = read_rows(data.data, data.split)
    kept = [row for row in rows if row.where in by_row]
    written = [row.values | dict(zip((CHOSEN, REJECTED), by_row[row.where], strict=True)) for row in kept]
    _write(Path(path), written)
    left = f", {len(rows) - len(written)} that cannot be used left out" if len(rows) > len(written) else ""
    return f"exported {len(written)} of {len(rows)} rows to {path}{left}"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        if path.suffix.lower() == ".parquet":
            _write_parquet(fresh, rows)
        else:
            _write_jsonl(fresh, rows)
        sync(fresh)
        fresh.replace(path)
        sync(path.parent)
    except OSError as error:
        raise SaveError(path, error) from error
    finally:
        fresh.unlink(missing_ok=True)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:  # dates, bytes; texts that are no UTF-8
                raise UserError(
                    f"--export: the data has values that JSON cannot hold ({error}); take .parquet."
                ) from error


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        kinds = dict.fromkeys((CHOSEN, REJECTED), pyarrow.float32())
        columns = {name: pyarrow.array([row.get(name) for row in rows], kinds.get(name)) for name in names}
        parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"--export: the data has columns of mixed types, which Parquet cannot hold; take .jsonl. "
            f"({first_line(error)})"
        ) from error
