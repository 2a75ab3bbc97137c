"""Files of settings that are not what they should be: each is refused with a message, and nothing of it is run."""

import dataclasses
import os
from typing import Any

import pytest

from fused_dpo_engine.cli import parse
from fused_dpo_engine.config import files
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import UserError

REQUIRED = ["--model", "a/model", "--data", "pairs.jsonl", "--output", "out"]
OPTIONS = [field.name for group in dataclasses.fields(TrainConfig) for field in dataclasses.fields(group.type)]  # pyright: ignore[reportArgumentType]
NINE = "[" + ", ".join(["*{0}"] * 9) + "]"
LAUGHS = "columns: &a [x, x]\n" + "".join(
    f"{name}: &{name} {NINE.format(before)}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "a million laughs": (LAUGHS, "unknown option 'b'"),
    "a list in itself": ("columns: &a [*a]", "columns must be a list of texts"),
    "a mapping in itself": ("&a beta: *a", "beta must be a number"),
    "merges": ("a: &a {beta: 1}\n<<: [*a, *a]", r"merge keys \(<<\) are not taken"),
    "another tag": ("beta: !what 1", "could not determine a constructor for the tag '!what'"),
    "a tuple": ("columns: !!python/tuple [a]", "could not determine a constructor"),
    "a name twice": ("beta: 0.1\nbeta: 0.9", "a name is set twice"),
    "a name twice in JSON": ('{"beta": 0.1, "beta": 0.9}', "a name is set twice"),
    "a name in two spellings": ("max_steps: 1\nmax-steps: 2", "max_steps is set twice"),
    "a number for a name": ("1: 2", "unknown option 1"),
    "nothing for a name": ("null: 2", "unknown option None"),
    "a list for a name": ("? [a]\n: 2", "found unhashable key"),
    "two documents": ("beta: 0.1\n---\nbeta: 0.2\n", "expected a single document"),
    "NUL": ("beta: 0.1\0", "not valid YAML: unacceptable character"),
    "NUL in a text": ('output: "a\\0b"', "output must be a text of valid Unicode, without NUL"),
    "a lone surrogate": ('output: "\\ud800"', "output must be a text of valid Unicode"),
    "no text": (b"\xff\xfe\0\1beta", "not valid YAML: 'utf-8' codec"),
    "UTF-16": ("beta: 0.1".encode("utf-16"), "not valid YAML: 'utf-8' codec"),
    "brackets": ("beta: " + "[" * 100_000, "nested too deep"),
    "braces": ("a: {" * 20_000, "nested too deep"),
    "a number beyond Python": ("seed: 1" + "0" * 5000, "not valid YAML: Exceeds the limit"),
    "a hexadecimal one": ("seed: 0x" + "f" * 5000, "seed must be a whole number, got a number of thousands of digits"),
    "one for a text": ("output: 0x" + "f" * 5000, "output must be a text"),
    "one in sixties": ("seed: 1" + ":59" * 3000, "seed must be a whole number"),
    "no such day": ("output: 2001-99-99", "not valid YAML: month must be in"),
    "bytes": ("output: !!binary aGVsbG8=", "output must be a text"),
    "a set": ("columns: !!set {a, b}", "columns must be a list of texts"),
    "another option for a text": ("output: --overwrite", "output must be a text .*without a dash at its beginning"),
    "another option in a list": ("columns: [--overwrite]", "columns must be .*without a dash at its beginning"),
    "an object in a list": ("report_to: [tensorboard, [x]]", "report_to must be a list, each one of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind):
    content, message = REFUSED[kind]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        parse("train", [*REQUIRED, "--config", str(path)])
    assert len(str(caught.value)) < 1000


def test_small_anchors_are_taken(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: &n 3\nlora_rank: *n\n")
    config = parse("train", [*REQUIRED, "--config", str(path)])
    assert (config.run.seed, config.lora.lora_rank) == (3, 3)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system", "module:antigravity"]
)
def test_objects_are_not_built(tmp_path, tag):
    witness = tmp_path / "witness"
    (tmp_path / "run.yaml").write_text(f"beta: !!python/{tag} ['touch {witness}']\n")
    with pytest.raises(UserError, match="could not determine a constructor for the tag"):
        parse("train", [*REQUIRED, "--config", str(tmp_path / "run.yaml")])
    assert not witness.exists()


def test_other_kinds_of_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, "/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="--config needs an existing YAML file"):
            parse("train", [*REQUIRED, "--config", str(path)])
    (tmp_path / "large.yaml").write_bytes(b"#" * (files.LARGEST + 1))
    with pytest.raises(UserError, match="has more than 1048576 bytes"):
        parse("train", [*REQUIRED, "--config", str(tmp_path / "large.yaml")])


VALUES: dict[str, Any] = {
    **{"truth": "true", "number": "3", "negative": "-1", "fraction": "0.5", "text": "hello", "empty": "''"},
    **{"list": "[1, a]", "map": "{a: 1}", "infinity": ".inf", "nan": ".nan", "huge": "1" + "0" * 400},
    **{"day": "2001-01-01", "lists": "[[1]]", "bytes": "!!binary aGVsbG8=", "set": "!!set {a}", "dash": "--x"},
    **{"nothing in a list": "[null]", "empty list": "[]", "empty map": "{}", "truth in a list": "[true]"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_type_for_every_option(tmp_path, option, capfd):
    """Each is taken, or refused in a sentence; that of a value in a wrong range comes from the parser of options."""
    path = tmp_path / "run.yaml"
    taken = []
    for kind, value in VALUES.items():
        path.write_text(f"{option}: {value}\n")
        try:
            parse("train", [*REQUIRED, "--config", str(path)])
            taken.append(kind)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
        except SystemExit as stop:
            assert stop.code == 2  # noqa: PT017
    assert "Traceback" not in capfd.readouterr().err
    assert not {"map", "empty map", "lists", "bytes", "set", "dash"} & set(taken)
    assert len(taken) < len(VALUES) - 5
