"""`fused-dpo reference`: fills, verifies, exports; what it exports is taken by `train`, and tried."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from fused_dpo_engine.data.formats import Row
from fused_dpo_engine.data.tokenization import tokenize_pairs
from tests.engine.support.references import counted, overwrite, stored
from tests.engine.support.toys import (
    Outcome,
    byte_tokenizer,
    options,
    own_logps,
    read_metrics,
    save_folder,
    toy_rows,
    write_rows,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def reference(command, toy_settings, store) -> Callable[..., Outcome]:
    names = ("model", "data", "max_length", "tokens_per_batch", "dtype", "device")
    usual = {name: toy_settings[name] for name in names}
    return lambda *more, **settings: command("reference", *options(**{**usual, "store": store, **settings}), *more)


def good(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.err
    return outcome.err


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestFill:
    def test_a_run_finds_all(self, reference, train, store: Path) -> None:
        with counted() as counts:
            assert "0 of 24 pairs found" in good(reference())
        assert counts.scored == [24]
        with counted() as counts:
            assert "24 of 24 pairs found" in good(reference())
        assert counts.loaded == [], "nothing is missing"
        with counted() as counts:
            assert "18 of 18 pairs found" in good(train(reference_store=store))
        assert counts.scored == []

    def test_the_numbers_are_the_models_own(self, reference, store: Path, tiny_llama: Path, tmp_path: Path) -> None:
        good(reference(export=tmp_path / "x.jsonl"))
        rows = [Row(values, f"{number}") for number, values in enumerate(toy_rows(24))]
        pairs = tokenize_pairs(rows, byte_tokenizer(), max_length=48).pairs
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").double()
        with torch.no_grad():
            expected = own_logps(model, pairs).view(-1, 2)
        exported = read_jsonl(tmp_path / "x.jsonl")
        got = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in exported]).double()
        # Two units in the last place of the largest, 63 nat; 2.8e-6 measured.
        torch.testing.assert_close(got, expected, rtol=0, atol=8e-6)

    @pytest.mark.parametrize(
        "settings",
        [
            {"ref_model": True},
            {"ref_model": True, "dtype": "bfloat16"},
            {"lora_rank": 2, "dtype": "bfloat16"},
            {"dtype": "bfloat16", "packing": False},
            {"ld_alpha": 0.3, "eval_fraction": 0.25},
        ],
    )
    def test_the_settings_of_a_run_as_a_file(
        self, reference, train, store: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        """A run without a store, its config.json for the command, and the run with the store that this has filled."""
        if settings.get("ref_model"):
            settings = {**settings, "ref_model": save_folder(tmp_path / "frozen", seed=3)}
        good(train(**settings, output=tmp_path / "plain"))
        file = str(tmp_path / "plain/config.json")
        assert "0 of 24 pairs found" in good(reference("--config", file, dtype=settings.get("dtype", "float32")))
        with counted() as counts:
            good(train(**settings, output=tmp_path / "stored", reference_store=store))
        assert counts.scored == []
        first, again = (read_metrics(tmp_path / name)[0]["loss"] for name in ("plain", "stored"))
        assert again == pytest.approx(first, abs=1e-3 if settings.get("dtype") else 1e-6)

    def test_a_file_that_is_only_read(self, reference, store: Path, tmp_path: Path, monkeypatch) -> None:
        good(reference())
        monkeypatch.setattr("os.access", lambda file, mode: Path(file) != store)
        good(reference(verify=4))
        outcome = reference(data=write_rows(tmp_path / "more.jsonl", toy_rows(30)))
        assert outcome.status == 1
        assert "could not be written: attempt to write a readonly database" in outcome.message

    def test_messages(self, reference, tmp_path: Path) -> None:
        assert "takes up to 2 x max-length" in reference(max_length=96).message
        assert "leave out --ref-model" in reference(lora_rank=2, ref_model="x").message
        assert "must lie in [0, 1]" in reference(ld_alpha=2).message
        assert "verify must be 0" in reference(verify=-1).message
        assert "is a folder" in reference(store=tmp_path).message
        small = save_folder(tmp_path / "small", vocab_size=200)
        assert "lies outside the model's 200 embeddings" in reference(model=small).message


class TestVerify:
    def test_it_says_how_far(self, reference, store: Path) -> None:
        good(reference())
        err = good(reference(verify=7, tokens_per_batch=300))
        assert re.search(r"verified 7 of 48 stored sequences: at most 0 nat apart", err)
        overwrite(store, 1e-5)
        found = re.search(r"verified 48 of 48 stored sequences: at most (\S+) nat", good(reference(verify=1000)))
        assert found is not None
        assert 9e-6 < float(found[1]) < 3e-5

    def test_it_refuses(self, reference, store: Path) -> None:
        good(reference())
        overwrite(store, -0.1)
        good(reference())  # control: nobody looks
        outcome = reference(verify=3)
        assert outcome.status == 2
        assert "the store has other log-probs than this model gives" in outcome.message

    def test_the_sample_is_the_seeds(self, reference) -> None:
        good(reference())
        wheres = [re.search(r"apart \((\S+:\d+):", good(reference(verify=1, seed=seed))) for seed in (0, 0, 1, 2, 3)]
        rows = [match and match[1] for match in wheres]
        assert rows[0] == rows[1]
        assert len(set(rows)) > 1


class TestExport:
    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_round_trip(self, reference, train, tmp_path: Path, name: str) -> None:
        """All columns stay, a run takes the new ones and scores none but a sample, with the loss of a run without."""
        rows = [{**row, "id": number, "nested": {"a": [number]}} for number, row in enumerate(toy_rows(24))]
        data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / name
        good(reference(data=data, export=out))
        kind = "json" if name.endswith("jsonl") else "parquet"
        loaded: Any = load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
        exported = list(loaded)
        columns = {"ref_chosen_logps", "ref_rejected_logps"}
        assert [{key: value for key, value in row.items() if key not in columns} for row in exported] == rows
        with counted() as counts:
            err = good(train(data=out))
        assert counts.scored == []
        assert "reference log-probs: 24 pairs bring theirs\n" in err
        assert "log-probs of 18 pairs from the data's columns; 16 computed again, at most" in err
        assert "columns not used: id, nested\n" in err
        good(train(data=data, output=tmp_path / "plain"))
        assert read_metrics(tmp_path / "run")[-1]["loss"] == read_metrics(tmp_path / "plain")[-1]["loss"]

    def test_bad_rows_are_left_out_and_counted(self, reference, tmp_path: Path) -> None:
        rows = [*toy_rows(5), {"prompt": "is it? "}, *toy_rows(7)[5:]]
        data = write_rows(tmp_path / "in.jsonl", rows)
        err = good(reference("--skip-bad-rows", data=data, export=tmp_path / "out.jsonl", eval_fraction=0.3))
        assert "exported 7 of 8 rows" in err
        assert "1 that cannot be used left out" in err
        assert [row["chosen"] for row in read_jsonl(tmp_path / "out.jsonl")] == [row["chosen"] for row in toy_rows(7)]

    def test_several_answers_are_refused(self, reference, tmp_path: Path, store: Path) -> None:
        rows = [*toy_rows(3), {"prompt": "is it? ", "chosen": "yes", "rejected": ["no", "nono"]}]
        data = write_rows(tmp_path / "in.jsonl", rows)
        outcome = reference(data=data, export=tmp_path / "out.jsonl")
        assert outcome.status == 2
        assert "in.jsonl:4 has more than two answers" in outcome.message
        assert not (tmp_path / "out.jsonl").exists()
        assert len(stored(store)) == 9, "the store has them all the same"

    def test_files(self, reference, tmp_path: Path, toy_data: Path) -> None:
        out = tmp_path / "out.jsonl"
        out.write_text("mine")
        assert "is there already" in reference(export=out).message
        assert out.read_text() == "mine"
        good(reference(export=out, overwrite=True))
        assert len(read_jsonl(out)) == 24
        assert "writes .jsonl or .parquet" in reference(export=tmp_path / "out.csv").message
        assert "is a file that is read" in reference(export=toy_data, overwrite=True).message
        assert "there is no folder" in reference(export=tmp_path / "none/out.jsonl").message
        assert "is a folder" in reference(export=_folder(tmp_path / "a.jsonl")).message
        assert "leave out --ld-alpha" in reference(export=tmp_path / "x.jsonl", ld_alpha=0.5).message
        assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left beside it"

    def test_values_that_a_format_cannot_hold(self, reference, tmp_path: Path) -> None:
        rows = [{**row, "id": number if number % 2 else str(number)} for number, row in enumerate(toy_rows(4))]
        data = write_rows(tmp_path / "in.jsonl", rows)
        outcome = reference(data=data, export=tmp_path / "out.parquet")
        assert outcome.status == 2
        assert "columns of mixed types" in outcome.message
        assert list(tmp_path.glob("*out.parquet*")) == []
        good(reference(data=data, export=tmp_path / "out.jsonl"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


class TestColumns:
    """Log-probs that the data of a run brings."""

    @pytest.fixture
    def columns(self, reference, tmp_path: Path) -> list[dict[str, Any]]:
        good(reference(export=tmp_path / "exported.jsonl"))
        return read_jsonl(tmp_path / "exported.jsonl")

    def changed(self, tmp_path: Path, rows: list[dict[str, Any]], shift: float, names: str = "ref") -> Path:
        return write_rows(
            tmp_path / f"changed{shift}{names}.jsonl",
            [
                {
                    **{key: value for key, value in row.items() if not key.startswith("ref_")},
                    f"{names}_chosen_logps": row["ref_chosen_logps"] + shift,
                    f"{names}_rejected_logps": row["ref_rejected_logps"],
                }
                for row in rows
            ],
        )

    def test_numbers_of_another_model_are_refused(self, train, columns, tmp_path: Path) -> None:
        good(train(data=self.changed(tmp_path, columns, -0.01), output=tmp_path / "rounding"))
        wrong = self.changed(tmp_path, columns, -4.0)
        outcome = train(data=wrong)
        assert outcome.status == 2
        assert "are not of this model, of these tokens, or not sums over tokens" in outcome.message
        assert re.search(r"changed\S*:\d+: -\d+\.\d+, computed again -\d+\.\d+", outcome.message)
        with counted() as counts:
            good(train(data=wrong, reference_columns="never"))
        assert counts.scored == [18]

    def test_older_names(self, train, columns, tmp_path: Path) -> None:
        with counted() as counts:
            err = good(train(data=self.changed(tmp_path, columns, 0.0, "reference")))
        assert counts.scored == []
        assert "columns not used" not in err

    def test_they_are_tried_on_a_reference_of_its_own(self, train, columns, tiny_llama: Path, tmp_path: Path) -> None:
        """Which is loaded for that: what somebody else has computed is believed by nobody."""
        other = save_folder(tmp_path / "other", seed=5)
        data = self.changed(tmp_path, columns, 0.0)
        outcome = train(data=data, ref_model=other)
        assert outcome.status == 2
        assert "are not of this model" in outcome.message
        with counted() as counts:
            err = good(train(data=data, model=other, ref_model=tiny_llama))
        assert (counts.scored, counts.loaded) == ([], [str(tiny_llama), str(other)])
        assert "16 computed again, at most" in err

    def test_rows_without_are_scored(self, train, columns, tmp_path: Path) -> None:
        rows = [dict(row) for row in columns]
        for row in rows[:10]:
            del row["ref_rejected_logps"]
        with counted() as counts:
            err = good(train(data=write_rows(tmp_path / "some.jsonl", rows), max_steps=None))
        assert counts.scored == [10]
        assert "24 pairs bring theirs, 10 cannot be taken" in err

    def test_a_store_comes_first(self, train, columns, store: Path, tmp_path: Path) -> None:
        wrong = self.changed(tmp_path, columns, -4.0)
        err = good(train(data=wrong, reference_store=store))
        assert "18 of 18 pairs found" in err
        assert "from the data's columns" not in err

    def test_weighted_sums_are_none_of_theirs(self, train, columns, tmp_path: Path) -> None:
        with counted() as counts:
            good(train(data=self.changed(tmp_path, columns, 0.0), ld_alpha=0.5))
        assert counts.scored == [18]
