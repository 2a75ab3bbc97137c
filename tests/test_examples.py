"""The README's code, the example data and the fetching of the example model."""

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import demo, minimal, smollm2
from fused_dpo_engine.data.formats import parse_row
from fused_dpo_engine.data.sources import read_rows
from tests.engine.support.toys import save_folder

ROOT = Path(__file__).parents[1]


def test_readme_snippet(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's code runs as it stands, begins at ln 2, learns, and has the log-probs that logits give."""
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippet, names)
    losses = [float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[2] < losses[0] - 0.1
    model, input_ids, labels = names["model"], names["input_ids"], names["labels"]
    token_logps = model(input_ids).logits[:, :-1].log_softmax(-1)
    picked = token_logps.gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
    expected = picked.masked_fill(labels[:, 1:] == -100, 0.0).sum(1)
    torch.testing.assert_close(torch.cat(names["score"](model)), expected, rtol=1e-5, atol=1e-4)  # fp32, other order


def test_minimal_example() -> None:
    """It begins at ln 2, learns, and needs no transformers."""
    losses = minimal.main()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    source = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE)) == {"copy", "torch", "fused_dpo"}


def test_patched_trl_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It begins at ln 2, and every forward pass of policy and reference is packed."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from examples import patched_trl

    folder = save_folder(tmp_path / "model")
    losses = patched_trl.main(str(folder), steps=2)
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert "4 of 4 forward passes packed" in capsys.readouterr().out


def test_example_preferences() -> None:
    """At least 200 different pairs, each of them usable, and length does not tell which response is preferred."""
    pairs = [parse_row(row) for row in read_rows(ROOT / "examples" / "preferences.jsonl")]
    assert len({str(pair.prompt) for pair in pairs}) == len(pairs) >= 200

    def words(response: object) -> int:
        assert isinstance(response, list)
        return len(response[0]["content"].split())

    longer = sum(words(pair.rejected) > words(pair.chosen) for pair in pairs) / len(pairs)
    assert 0.4 < longer < 0.6


def test_model_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the way out, and no half of a model is left to be taken for one."""
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"no matching distribution(.|\n)*--model"):
        smollm2.prepare_smollm2(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_converted_model_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_download", lambda folder: pytest.fail("downloaded again"))
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.prepare_smollm2(tmp_path) == tmp_path


def test_digits_are_single_tokens() -> None:
    """What transformers' GGUF loader loses of SmolLM2's tokenizer, on the converted model where there is one."""
    folder = smollm2.cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("SmolLM2 has not been converted here; python -m examples.smollm2 does it")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_computes_in_what_the_machine_is_fast_in(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is left to choose, as the comparison chooses, and each stage says how long it takes."""
    asked: list[tuple] = []
    commands: list[list[str]] = []

    def compare(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        return [{"implementation": way, "median_s": 6.0, "extra_mib": 1000.0} for way in demo.WAYS]

    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(demo, "compute_dtype", {"cpu": dtype}.get)
    monkeypatch.setattr(demo, "compare", compare)
    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr("sys.argv", ["demo", "--model", "m", "--output", str(tmp_path), "--max-steps", "10"])
    assert demo.main() == 3
    assert asked == [("m", str(ROOT / "examples" / "preferences.jsonl"), 8, 2048, dtype, 1, demo.WAYS)]
    assert not any("dtype" in argument for argument in commands[0])
    assert "one to two minutes" in (said := capsys.readouterr().out)
    assert "10 such steps, about 2 minutes" in said


def test_the_demo_refuses_an_unknown_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> None:
        raise ValueError("ONEDNN_MAX_CPU_ISA=AVX3 names no instruction set")

    monkeypatch.setattr(demo, "compute_dtype", refuse)
    monkeypatch.setattr("sys.argv", ["demo", "--model", "m"])
    assert demo.main() == 1
    assert capsys.readouterr().err == "ONEDNN_MAX_CPU_ISA=AVX3 names no instruction set\n"
