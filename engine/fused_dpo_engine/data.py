"""Preference rows: where they come from, and which of the known formats each one has.

`read_rows` reads a source into `Row`s without judging them; `parse_row` turns one into a `Preference`, or raises a
`DataError` that names its file and line. A line that is not even JSON becomes a `Row` that carries its error, so that
whoever consumes the rows decides in one place whether bad ones stop the run or are skipped and counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_dpo_engine.errors import UserError

Message = dict[str, Any]

_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxdict = 3


class DataError(UserError):
    """What a user can put right in the data or its settings; `reason` is the short label it is counted under."""

    def __init__(self, message: str, *, reason: str = "unusable"):
        super().__init__(message)
        self.reason = reason


def bad_row(where: str, message: str, reason: str) -> DataError:
    """The error for a single unusable row, with the way out that all of them share."""
    return DataError(f"{where}: {message}. --skip-bad-rows drops and counts such rows", reason=reason)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its columns and where it stands (`pairs.jsonl:17`), or the error that kept it unread."""

    values: dict[str, Any]
    where: str
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A parsed row: all texts, or all lists of messages.

    `prompt` is None for texts that only share a beginning; conversations always have one.
    """

    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read every row of a file, a folder or a Hugging Face data set.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json` (a list of objects, or an object with such a list under "data") or
            `.parquet` file; a folder written by `Dataset.save_to_disk` or full of data files; else the name of a data
            set on the Hugging Face Hub.
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
        elif path.exists():
            rows = _read_file(path, name)
        elif isinstance(source, Path) or name.endswith(_FILE_SUFFIXES) or not _HUB_NAME.fullmatch(name):
            raise DataError(f"{name}: no such file or folder (looked for {os.path.abspath(path)})")
        else:
            rows = _read_hub(name, split)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: could not be read: {type(error).__name__}: {error}") from error
    if not rows:
        raise DataError(f"{name}: holds no rows; a preference file needs at least one")
    return rows


def _read_file(path: Path, name: str) -> list[Row]:
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path, name)
    if name.endswith(".json"):
        return _read_json(path, name)
    if name.endswith(".parquet"):
        return _read_parquet(path, name)
    raise DataError(f"{name}: the file's name must end in one of {', '.join(_FILE_SUFFIXES)}")


def _read_jsonl(path: Path, name: str) -> list[Row]:
    rows = []
    # Bytes, not text: lines end at \n alone, and a line that is not UTF-8 spoils only itself.
    with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                rows.append(_read_line(line, f"{name}:{number}"))
    return rows


def _read_line(line: bytes, where: str) -> Row:
    try:
        return _row(json.loads(line.decode("utf-8")), where)
    except (ValueError, RecursionError) as error:
        shown = _short(line.decode("utf-8", errors="replace").strip())
        what = f"each line must be one JSON object in UTF-8, got {shown} ({error})"
        return Row({}, where, bad_row(where, what, "malformed line"))


def _read_json(path: Path, name: str) -> list[Row]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig").strip() or "[]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON: {error}; a file with one object a line is named .jsonl") from error
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError(
            f'{name}: must hold a list of objects, or one object with such a list under "data", got {_short(content)}; '
            "a file with one object a line is named .jsonl"
        )
    return [_row(item, f"{name} row {number}") for number, item in enumerate(items, start=1)]


def _read_parquet(path: Path, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            items = [item for batch in file.iter_batches() for item in batch.to_pylist()]
    except pyarrow.ArrowException as error:
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
    except DataError:
        raise
    except Exception as error:  # datasets raises whatever its readers do
        raise DataError(
            f"{name}: the folder could not be read as a data set: {type(error).__name__}: {error}; "
            "it must come from Dataset.save_to_disk, or hold data files"
        ) from error
    return _dataset_rows(dataset, name, split)


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client have no common base class
        offline = isinstance(error, ConnectionError)
        state = "the Hugging Face Hub cannot be reached" if offline else "the Hugging Face Hub did not deliver it"
        raise DataError(
            f"{name}: there is no such file or folder, and as a data set (split {split!r}) {state}: "
            f"{type(error).__name__}: {error}; check the name, or download it elsewhere and pass the local folder or a "
            f"{', '.join(_FILE_SUFFIXES)} file"
        ) from error
    return _dataset_rows(dataset, name, split)


def _dataset_rows(dataset: Iterable[Any], name: str, split: str) -> list[Row]:
    return [Row(dict(values), f"{name} ({split}) row {number}") for number, values in enumerate(dataset, start=1)]


def _row(item: Any, where: str) -> Row:
    if isinstance(item, dict):
        return Row(item, where)
    return Row({}, where, bad_row(where, f"a row must be a JSON object, got {_short(item)}", "not an object"))


def parse_row(row: Row) -> Preference:
    """Detect a row's format and check it.

    Known: texts with or without a prompt; lists of messages with or without a prompt, where beside a prompt of
    messages each response may also be one message or plain text, taken as the assistant's. Other columns are ignored.
    A conversation without a prompt is split after the messages both sides share, leaving each at least one; so is one
    whose prompt column only repeats the text that both sides open with (as in UltraFeedback).

    Raises:
        DataError: the row is none of these; names where it stands.
    """
    if row.error is not None:
        raise row.error
    where, values = row.where, row.values
    missing = [key for key in ("chosen", "rejected") if key not in values]
    if missing:
        keys = ", ".join(repr(key) for key in values) or "none"
        what = f'a row needs "chosen" and "rejected", and mostly "prompt"; missing {missing}, got the keys {keys}'
        raise bad_row(where, f"{what}; rename the columns", "missing key")

    prompt, chosen, rejected = (values.get(key) for key in ("prompt", "chosen", "rejected"))
    if "prompt" not in values:
        preference = _without_prompt(chosen, rejected, where)
    elif isinstance(prompt, list):
        prompt = _messages(prompt, "prompt", where)
        preference = Preference(
            prompt, _response(chosen, "chosen", where), _response(rejected, "rejected", where), where
        )
        if preference.chosen[: len(prompt)] == preference.rejected[: len(prompt)] == prompt:
            what = '"chosen" and "rejected" must not repeat the messages of "prompt"'
            raise bad_row(where, f"{what}, got both beginning with them; remove the column prompt", "repeated prompt")
    elif isinstance(prompt, str) and _opens_with(prompt, chosen) and _opens_with(prompt, rejected):
        preference = _without_prompt(chosen, rejected, where)
    else:
        prompt = _text(prompt, "prompt", where, "text or a list of messages")
        preference = Preference(prompt, *_texts(chosen, rejected, '"prompt" is text', where), where)
    if preference.chosen == preference.rejected:
        what = f'"chosen" and "rejected" must differ, got {_short(preference.chosen)} for both'
        raise bad_row(where, what, "chosen equals rejected")
    return preference


def _without_prompt(chosen: Any, rejected: Any, where: str) -> Preference:
    if isinstance(chosen, str) or isinstance(rejected, str):
        chosen, rejected = _texts(chosen, rejected, "one response is text", where)
        if chosen[:1] != rejected[:1]:
            raise _nothing_common(chosen, rejected, where)
        return Preference(None, chosen, rejected, where)
    kind = "text or a list of messages"
    chosen, rejected = _messages(chosen, "chosen", where, kind), _messages(rejected, "rejected", where, kind)
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):  # the last message of each is a response
        if a != b:
            break
        shared += 1
    if shared == 0 and chosen != rejected:
        raise _nothing_common(chosen, rejected, where)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:], where)


def _opens_with(prompt: str, response: Any) -> bool:
    """Whether a list of messages begins with the prompt's text, a system message before it aside."""
    if not isinstance(response, list):
        return False
    contents = [message.get("content") for message in response if isinstance(message, dict)]
    return prompt in contents[:2]


def _texts(chosen: Any, rejected: Any, given: str, where: str) -> tuple[str, str]:
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, (list, dict)):
            way_out = "make them all text, or all lists of messages without repeating the prompt's"
            what = f'a row must not mix text and messages, got: {given} but "{key}" is {_short(value)}; {way_out}'
            raise bad_row(
                where, f"{what}; if the responses hold the whole conversation, remove prompt", "mixed formats"
            )
    return _text(chosen, "chosen", where), _text(rejected, "rejected", where)


def _nothing_common(chosen: Any, rejected: Any, where: str) -> DataError:
    what = 'without "prompt", "chosen" and "rejected" must share a beginning, got'
    shown = f"{_short(chosen)} and {_short(rejected)}"
    return bad_row(where, f'{what} {shown}; put the question into "prompt"', "no common beginning")


def _response(value: Any, key: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(value, key, where)}]
    return _messages([value] if isinstance(value, dict) else value, key, where, "a list of messages, a message or text")


def _messages(value: Any, key: str, where: str, kind: str = "a list of messages") -> list[Message]:
    if not isinstance(value, list):
        raise bad_row(where, f'"{key}" must be {kind}, got {_short(value)}', "wrong type")
    if not value:
        raise bad_row(where, f'"{key}" must hold at least one message, got an empty list', "empty messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            rule = 'must be a list of messages {"role": text, "content": text}'
            raise bad_row(where, f'"{key}" {rule}, got the item {_short(message)}', "wrong type")
        _text(message.get("content"), f"content of the {message['role']} message in {key}", where)
    # Columnar files fill keys that other rows have with None.
    return [{name: field for name, field in message.items() if field is not None} for message in value]


def _text(value: Any, key: str, where: str, kind: str = "text") -> str:
    if not isinstance(value, str):
        raise bad_row(where, f'"{key}" must be {kind}, got {_short(value)}', "wrong type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f'"{key}" must be valid Unicode, got a lone surrogate at character {error.start}'
        raise bad_row(where, what, "invalid Unicode") from error
    return value


def _short(value: Any) -> str:
    return _SHORT.repr(value)
