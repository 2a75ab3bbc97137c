"""Where preference rows come from: files, folders, data sets on the Hugging Face Hub.

`read_rows` reads a source into `Row`s without judging them. A line that is not even JSON becomes a `Row` that carries
its error, so that whoever consumes the rows decides in one place whether bad ones stop the run or are skipped and
counted.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_dpo_engine.data.formats import Row
from fused_dpo_engine.data.json_text import read_json
from fused_dpo_engine.errors import DataError, bad_row, short

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".csv", ".tsv")
LONGEST_LINE = 2**28
"""Bytes of a line from which on a file is refused, so that one without any newline cannot fill the memory."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read every row of a file, a folder or a Hugging Face data set.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.json` (a list of objects, or an object with such a list under
            "data"), `.parquet`, `.csv` or `.tsv` file; a folder written by `Dataset.save_to_disk` or full of data
            files; else the name of a data set on the Hugging Face Hub.
        split: which split of a folder or hub data set; a single file has no splits and is read whole.

    Returns:
        At least one row, in the order of the source. Rows that could not be read carry their `error`.

    Raises:
        DataError: the source is missing, unreadable as a whole, or holds no rows.
    """
    name, path = str(source), Path(source).expanduser()
    try:
        if path.is_dir():
            rows = _read_folder(path, name, split)
        elif path.is_file():
            rows = _read_file(path, name)
        elif path.exists():  # opening a pipe waits for somebody to write, and a device may have no end
            raise DataError(f"{name}: is a pipe, socket or device; copy what it gives to a file, and name that")
        elif isinstance(source, Path) or name.lower().endswith(_FILE_SUFFIXES) or not _HUB_NAME.fullmatch(name):
            raise DataError(f"{name}: no such file or folder (looked for {os.path.abspath(path)})")
        else:
            rows = _read_hub(name, split)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: could not be read: {type(error).__name__}: {error}") from error
    if not rows:
        raise DataError(f"{name}: holds no rows; a preference file needs at least one")
    return rows


def _read_file(path: Path, name: str) -> list[Row]:
    suffix = name.lower()
    if suffix.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _read_jsonl(path, name)
    if suffix.endswith(".json"):
        return _read_json(path, name)
    if suffix.endswith(".parquet"):
        return _read_parquet(path, name)
    if suffix.endswith((".csv", ".tsv")):
        return _read_table(path, name)
    raise DataError(f"{name}: the file's name must end in one of {', '.join(_FILE_SUFFIXES)}")


def _read_jsonl(path: Path, name: str) -> list[Row]:
    rows = []
    # Bytes, not text: lines end at \n alone, and a line that is not UTF-8 spoils only itself.
    with _opened(path, name.lower()) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                what = f"the line has more than {LONGEST_LINE} bytes; each line must be one JSON object"
                raise DataError(f"{name}:{number}: {what}")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                rows.append(_read_line(line, f"{name}:{number}"))
    return rows


def _opened(path: Path, name: str) -> Any:
    """Open a file of lines, compressed or not."""
    if name.endswith(".gz"):
        return gzip.open(path)
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _read_table(path: Path, name: str) -> list[Row]:
    """Read comma- or tab-separated values; their first line names the columns, and an empty cell is no value.

    A quote that is never closed would make a cell of all lines after it, so quotes are taken strictly.
    """
    usual = csv.field_size_limit(sys.maxsize)  # a conversation may be longer than the usual 128 KiB
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if name.lower().endswith(".tsv") else ","
            reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
            _refuse_repeated(reader.fieldnames or (), name)
            rows = [({k: v or None for k, v in row.items()}, f"{name}:{reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}: not a readable table in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(usual)
    return [
        Row({}, where, bad_row(where, "the line has more cells than the first one has names", "malformed line"))
        if "" in values
        else Row(values, where)
        for values, where in rows
    ]


def _read_line(line: bytes, where: str) -> Row:
    try:
        return _row(read_json(line.decode("utf-8")), where)
    except ValueError as error:
        shown = short(line.decode("utf-8", errors="replace").strip())
        what = f"each line must be one JSON object in UTF-8, got {shown} ({error})"
        return Row({}, where, bad_row(where, what, "malformed line"))


def _read_json(path: Path, name: str) -> list[Row]:
    try:
        content = read_json(path.read_bytes().decode("utf-8-sig").strip() or "[]")
    except ValueError as error:
        raise DataError(f"{name}: not valid JSON: {error}; a file with one object a line is named .jsonl") from error
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError(
            f'{name}: must hold a list of objects, or one object with such a list under "data", got {short(content)}; '
            "a file with one object a line is named .jsonl"
        )
    return [_row(item, f"{name} row {number}") for number, item in enumerate(items, start=1)]


def _read_parquet(path: Path, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, name)
            items = [item for batch in file.iter_batches() for item in batch.to_pylist()]
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:  # text that is no UTF-8, times that Python has no value for
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error
    return [Row(item, f"{name} row {number}") for number, item in enumerate(items, start=1)]


def _read_folder(path: Path, name: str, split: str) -> list[Row]:
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise DataError(f"{name}: has no split {split!r}; choose one of {sorted(map(str, dataset))}")
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(str(path), split=split)
        return _dataset_rows(dataset, name, split)
    except DataError:
        raise
    except Exception as error:  # datasets raises whatever its readers do
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"
        raise DataError(
            f"{name}: the folder could not be read as a data set: {type(error).__name__}: {error}{cause}; "
            "it must come from Dataset.save_to_disk, or hold data files"
        ) from error


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    try:
        return _dataset_rows(datasets.load_dataset(name, split=split), name, split)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client have no common base class
        offline = isinstance(error, ConnectionError)
        state = "the Hugging Face Hub cannot be reached" if offline else "the Hugging Face Hub did not deliver it"
        raise DataError(
            f"{name}: there is no such file or folder, and as a data set (split {split!r}) {state}: "
            f"{type(error).__name__}: {error}; check the name, or download it elsewhere and pass the local folder or a "
            f"{', '.join(_FILE_SUFFIXES)} file"
        ) from error


def _dataset_rows(dataset: Iterable[Any], name: str, split: str) -> list[Row]:
    return [Row(dict(values), f"{name} ({split}) row {number}") for number, values in enumerate(dataset, start=1)]


def _refuse_repeated(names: Iterable[str], name: str) -> None:
    """Refuse columns of one name, of which one alone would be read."""
    seen: set[str] = set()
    for column in names:
        if column in seen:
            raise DataError(f"{name}: has two columns named {column!r}; rename or remove one of them")
        seen.add(column)


def _row(item: Any, where: str) -> Row:
    if isinstance(item, dict):
        return Row(item, where)
    return Row({}, where, bad_row(where, f"a row must be a JSON object, got {short(item)}", "not an object"))
