"""`fused-dpo plan`: its numbers, its histogram, and what it says of real preference data."""

import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.cli import main, parse
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.reports.plan import histogram, padded_slots, plan_statistics
from tests.engine.support.toys import PREFERENCES, SHARED, TOKENIZERS, make_pairs, options, write_rows

RUN = RunOptions(output="")
ROWS = [{"prompt": "is it 1? ", "chosen": "yes", "rejected": "no"}, {"prompt": "it? ", "chosen": "y", "rejected": "n"}]


class TestStatistics:
    PAIRS = make_pairs((5, 7, 3), (12, 1, 16), (1, 9, 9), (20, 2, 1), (3, 3, 3), (8, 2, 30))

    @pytest.mark.parametrize("layout", [{}, {"prefix_sharing": False}, {"packing": False}, {"batches_per_step": 1}])
    def test_slots_are_those_of_the_batches(self, layout):
        packing = PackingOptions(tokens_per_batch=80, **layout)
        statistics = plan_statistics(self.PAIRS, RUN, packing)
        if layout.get("packing", True):
            expected = pack(self.PAIRS, range(6), share=packing.prefix_sharing).num_slots
            assert statistics.slots == expected
        assert statistics.fill == pytest.approx(statistics.slots / (80 * statistics.passes))
        assert statistics.steps == (statistics.passes if "batches_per_step" in layout else 1)
        assert statistics.seconds > 0

    def test_padded(self):
        order = [3, 1, 0, 2, 5, 4]
        for count in (1, 2, 4, 16):
            batches = [order[at : at + count] for at in range(0, 6, count)]
            assert padded_slots(self.PAIRS, order, count) == sum(pad(self.PAIRS, b).num_slots for b in batches)

    def test_histogram(self):
        table = histogram([1, 2, 3, 4, 9, 9])
        cells = [list(column.cells) for column in table.columns]
        assert cells[:3] == [["1", "2", "4", "8"], ["1", "3", "7", "15"], ["1", "2", "1", "2"]]
        assert [len(str(bar)) for bar in cells[3]] == [20, 40, 20, 40]


@pytest.fixture
def plan(capfd, tiny_llama, toy_data):
    """The command's status, output and messages."""

    def call(*more: str, **settings: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main(["plan", *options(**{"model": tiny_llama, "data": toy_data, **settings}), *more])
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def row_of(out: str, name: str) -> list[str]:
    """Cells of the table's row that begins so."""
    (line,) = (line for line in out.splitlines() if f"│ {name}" in line)
    return [cell.strip() for cell in line.split("│")[2:-1]]


class TestCommand:
    def test_numbers(self, plan, tmp_path):
        data = write_rows(tmp_path / "two.jsonl", ROWS)
        status, out, _ = plan(data=data, tokens_per_batch=64)
        assert status == 0
        # One byte a token, and EOS: 9+3+1 and 9+2+1, 4+1+1 twice; shared 9+4+3 and 4+2+2.
        assert "2 pairs, 37 tokens, at most 64 in a forward pass" in out
        assert row_of(out, "these settings, 1 steps of 16 pairs") == ["24", "0.65", "1.00", "1", "37.5%"]
        assert row_of(out, "packed, prefixes not shared") == ["37", "1.00", "1.54", "1", "57.8%"]
        assert row_of(out, "--no-packing, 4 pairs a batch") == ["52", "1.41", "2.17", "1", ""]
        assert re.search(r"│ +8 │ +15 │ +1 │ █+", out)
        assert re.search(r"│ +16 │ +31 │ +1 │ █+", out)

    def test_settings_are_taken(self, plan):
        _, shared, _ = plan(tokens_per_batch=128)
        _, unshared, _ = plan("--no-prefix-sharing", tokens_per_batch=128)
        _, full, _ = plan(tokens_per_batch=128, batches_per_step=2)
        name = "these settings"
        assert (
            row_of(unshared, name) == row_of(unshared, "packed, prefixes not shared")[:2] + row_of(unshared, name)[2:]
        )
        assert float(row_of(unshared, name)[1]) == 1 > float(row_of(shared, name)[1])
        assert "steps of 2 full passes" in full
        assert row_of(full, name) == row_of(full, "packed, prefixes shared")

    def test_no_model_is_loaded(self, plan, monkeypatch):
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
        assert plan()[0] == 0

    def test_settings_of_a_run(self, plan, train_tiny):
        """config.json of a run says what to plan; what only training knows is left out."""
        run = train_tiny(max_steps=1, prefix_sharing=False)
        status, out, _ = plan("--config", str(run.output / "config.json"), model=None, data=None)
        assert status == 0
        assert "at most 96 in a forward pass" in out
        assert float(row_of(out, "these settings, 4 steps of 6 pairs")[1]) == 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"data": "nowhere.jsonl"}, "no such file"),
            ({"model": "./nowhere"}, "does not exist"),
            ({"max_length": 9000}, "more than tokens-per-batch"),
            ({"pairs_per_step": 0}, "pairs-per-step must be at least 1"),
            ({"seed": -1}, "seed must lie in"),
        ],
    )
    def test_bad_input(self, plan, settings, message):
        status, _, err = plan(**settings)
        assert status == 2
        assert message in " ".join(err.split())
        assert "Traceback" not in err

    def test_unknown_names_in_a_config_file(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text("tokens_per_bach: 8\n", encoding="utf-8")
        for command in ("plan", "train"):
            with pytest.raises(UserError, match="did you mean tokens_per_batch"):
                parse(command, ["--config", str(path)])

    def test_help(self, plan):
        status, out, _ = plan("--help")
        assert status == 0
        assert "--tokens-per-batch" in out
        assert "--learning-rate" not in out


def real_pairs(name: str, tokenizer: str) -> list[TokenPair]:
    loaded = AutoTokenizer.from_pretrained(TOKENIZERS / tokenizer)
    return tokenize_pairs(read_rows(PREFERENCES / name), loaded, max_length=4096, skip_bad_rows=True).pairs


@pytest.mark.skipif(
    not (PREFERENCES.is_dir() and TOKENIZERS.is_dir()), reason=f"no preference data and tokenizers in {SHARED}"
)
class TestRealPairs:
    """Token slots against padded batches, and fill, in full forward passes of 8192 tokens."""

    @pytest.mark.parametrize(
        ("name", "tokenizer", "against_4", "against_16", "sharing"),
        [
            ("hh_helpful.conversational.jsonl", "qwen2.5", 2.8, 3.9, 1.55),
            ("qa_long_prompts.strings.jsonl", "gpt2", 2.6, 2.8, 2.0),
            ("dpo_en.conversational.jsonl", "qwen2.5", 2.4, 3.4, 1.35),
        ],
    )
    def test_slots_and_fill(self, name, tokenizer, against_4, against_16, sharing):
        pairs = real_pairs(name, tokenizer)
        planned = plan_statistics(pairs, RUN, PackingOptions(batches_per_step=1))
        order = np.random.default_rng(0).permutation(len(pairs)).tolist()
        assert padded_slots(pairs, order, 4) > against_4 * planned.slots
        assert padded_slots(pairs, order, 16) > against_16 * planned.slots
        assert sum(pair.num_tokens for pair in pairs) > sharing * planned.slots
        # Only the last pass may be half empty; the least number of passes then bounds the fill of small data sets.
        possible = planned.slots / (8192 * -(-planned.slots // 8192))
        assert planned.fill >= min(0.97, possible)
        if name.startswith("hh_helpful"):
            assert planned.fill >= 0.97

    def test_the_report_is_printed(self, capfd):
        from fused_dpo_engine.reports.plan import report

        pairs = real_pairs("qa_long_prompts.strings.jsonl", "gpt2")
        Console(width=140).print(report(pairs, RUN, PackingOptions()))
        out = capfd.readouterr().out
        assert "200 pairs" in out
        assert len(re.findall("█+", out)) >= 3
