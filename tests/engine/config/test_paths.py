"""A run never writes over what it reads."""

from pathlib import Path

import pytest

from fused_dpo_engine.config.paths import refuse_overlap
from fused_dpo_engine.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, data and an earlier run, with links to them; the current folder."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    (tmp_path / "pairs.jsonl").symlink_to(tmp_path / "data" / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("output", "given", "relation"),
    [
        ("model", "model", "is"),
        ("model/", "./model", "is"),
        ("link", "model", "is"),
        ("model", "link", "is"),
        ("~/model", "model", "is"),
        ("run", "run/model", "contains"),
        ("data", "data/pairs.jsonl", "contains"),
        ("data", "pairs.jsonl", "contains"),  # a link into the folder
        (".", "model", "contains"),
        ("model/inner", "model", "lies in"),
        ("model/new/run", "model", "lies in"),
        ("link/new", "model", "lies in"),
    ],
)
def test_what_overlaps_is_refused(folder: Path, output: str, given: str, relation: str) -> None:
    with pytest.raises(UserError, match=f"--output {output} {relation} what --data names, {given};"):
        refuse_overlap(output, {"--model": None, "--data": given})


@pytest.mark.parametrize("output", ["runs/first", "model2", "mod", "new"])
def test_what_is_apart_is_not(folder: Path, output: str) -> None:
    refuse_overlap(
        output, {"--model": "model", "--data": "pairs.jsonl", "--ref-model": "org/name", "--eval-data": None}
    )


def test_a_name_on_the_hub_is_no_path(folder: Path) -> None:
    refuse_overlap("org/name", {"--model": "org/name"})
