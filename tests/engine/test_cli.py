"""The command as a user meets it: exit status, messages, and what bad input leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fused_dpo_engine.cli import main
from fused_dpo_engine.config import ACROSS_PAIRS
from tests.engine.helpers import (
    ROOT,
    byte_tokenizer,
    options,
    read_metrics,
    read_weights,
    save_folder,
    snapshot,
    toy_rows,
    write_rows,
)
from tests.engine.run_helpers import FIRST_LOSS

GOOD = toy_rows(3)


@dataclass
class Outcome:
    """Of one call of the command."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands on stderr, in one line, without the lines of a box around it."""
        return " ".join(re.sub(r"[│┃─━╭╮╰╯]|-{3,}", " ", self.err).split())


@pytest.fixture
def command(capfd) -> Callable[..., Outcome]:
    """Call the command in this process."""

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            status = main(arguments)
        except SystemExit as stop:  # the parser's way of ending --help and unknown options
            status = stop.code
        captured = capfd.readouterr()
        assert isinstance(status, int)
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def train(command, toy_settings, tmp_path) -> Callable[..., Outcome]:
    """`fused-dpo train` with `toy_settings` into `tmp_path / "run"` and the given changes."""
    return lambda *more, **settings: command(
        "train", *options(**{**toy_settings, "output": tmp_path / "run", **settings}), *more
    )


class TestCommands:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["env", "--help"]], ids=str)
    def test_usage(self, command, arguments):
        outcome = command(*arguments)
        assert outcome.status == 0
        assert "usage: fused-dpo COMMAND" in outcome.out
        assert re.search(r"^ +train +\w+", outcome.out, re.MULTILINE)
        assert re.search(r"^ +env +\w+", outcome.out, re.MULTILINE)

    def test_env(self, command):
        outcome = command("env")
        assert outcome.status == 0
        lines = dict(line.split("  ", 1) for line in outcome.out.splitlines())
        versions = {name.strip(): value.strip() for name, value in lines.items()}
        assert torch.__version__.startswith(versions["torch"])  # a local tag such as +cu130 may be missing
        assert versions["transformers"] == transformers.__version__
        assert versions["python"] == sys.version.split()[0]

    def test_env_takes_no_options(self, command):
        outcome = command("env", "--x")
        assert outcome.status == 2
        assert "fused-dpo: env takes no options, got --x" in outcome.message
        assert outcome.out == ""

    @pytest.mark.parametrize(("name", "hint"), [("tran", "did you mean train?"), ("serve", "usage:")])
    def test_unknown_command(self, command, name, hint):
        outcome = command(name)
        assert outcome.status == 2
        assert f"unknown command {name!r}" in outcome.err
        assert hint in outcome.err

    def test_train_help(self, command):
        outcome = command("train", "--help")
        assert outcome.status == 0
        assert "--learning-rate" in outcome.out
        shown = " ".join(re.sub(r"[│┃]", " ", outcome.out).split())
        assert "0 to less than 0.5" in shown
        assert "from the beginning of the prompt, down to half of max-length" in shown

    def test_train(self, train, tmp_path):
        outcome = train()
        assert outcome.status == 0
        assert "training data" in outcome.err
        assert "24 pairs of 24 rows" in outcome.err
        assert str(tmp_path / "run" / "model") in outcome.message.replace(" ", "")
        assert len(read_metrics(tmp_path / "run")) == 3

    @pytest.mark.parametrize(
        ("loss_type", "tokens_per_batch", "warned"),
        [*[(name, 96, 1) for name in ACROSS_PAIRS], ("aot", 4096, 0), ("sigmoid", 96, 0)],
    )
    def test_losses_that_depend_on_the_split_are_warned_of(self, train, loss_type, tokens_per_batch, warned):
        outcome = train(loss_type=loss_type, tokens_per_batch=tokens_per_batch, max_steps=2)
        assert outcome.status == 0
        said = f"{loss_type} compares the pairs of one forward pass with each other; --tokens-per-batch and packing"
        assert outcome.message.count(said) == warned

    def test_diverged(self, train, tmp_path):
        outcome = train(learning_rate=1e30, schedule="constant", warmup_ratio=0)
        assert outcome.status == 1
        assert "fused-dpo: step 2: loss nan" in outcome.message
        assert str(tmp_path / "run" / "model") in outcome.message
        assert "Traceback" not in outcome.err
        assert (tmp_path / "run" / "model").is_dir()

    def test_interrupted(self, train, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("fused_dpo_engine.trainer.Trainer._step", interrupted)
            outcome = train()
        assert outcome.status == 130
        assert outcome.err.rstrip().endswith("fused-dpo: interrupted")
        assert (tmp_path / "run" / "model").is_dir()

    def test_interrupted_while_loading(self, train, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("fused_dpo_engine.run.build_policy", interrupted)
        outcome = train()
        assert outcome.status == 130
        assert not (tmp_path / "run").exists()

    def test_interrupted_while_importing(self, command, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.delitem(sys.modules, "fused_dpo_engine.run")
        monkeypatch.setattr("builtins.__import__", interrupted)
        try:
            status = main(["train"])
        finally:
            monkeypatch.undo()
        assert status == 130

    def test_sigterm_is_an_interruption(self, train, tmp_path, monkeypatch):
        def terminated(*_):
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("fused_dpo_engine.trainer.Trainer._step", terminated)
        outcome = train()
        assert outcome.status == 130
        assert outcome.err.rstrip().endswith("fused-dpo: interrupted")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["stopped"] == "interrupted"
        assert signal.getsignal(signal.SIGTERM) == before

    def test_packages_of_the_trainer_are_missing(self, command, monkeypatch):
        monkeypatch.setitem(sys.modules, "fused_dpo_engine.run", None)
        outcome = command("train")
        assert outcome.status == 2
        assert "pip install 'fused-dpo[train]'" in outcome.err


def jsonl(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}
BAD_DATA: dict[str, tuple[str, str]] = {
    "empty file": ("", "{data}: holds no rows"),
    "blank lines": ("\n \n", "{data}: holds no rows"),
    "malformed line": (jsonl(*GOOD, '{"prompt": "a"'), "{data}:4: each line must be one JSON object"),
    "not an object": (jsonl(PAIR, [1]), "{data}:2: a row must be a JSON object"),
    "missing key": (jsonl(PAIR, {"prompt": "a", "chosen": "b"}), "{data}:2: a row needs"),
    "chosen equals rejected": (jsonl(PAIR, {**PAIR, "rejected": "b"}), '{data}:2: "chosen" and "rejected" must differ'),
    "prompt too long": (jsonl(PAIR, {**PAIR, "prompt": "a" * 60}), "{data}:2: the prompt's 60 tokens leave no room"),
    "number for text": (jsonl(PAIR, {**PAIR, "chosen": 3}), '{data}:2: "chosen" must be text, got 3'),
    "null for text": (jsonl(PAIR, {**PAIR, "rejected": None}), '{data}:2: "rejected" must be text, got None'),
    "empty prompt": (jsonl(PAIR, {**PAIR, "prompt": ""}), "{data}:2: both sequences must begin with a token"),
}
"""What is in the file, and what the message says of it."""


class TestBadInput:
    """Exit status 2, one message that says what and where, no traceback, and no output folder."""

    def check(self, outcome: Outcome, message: str, output: Path) -> None:
        assert outcome.status == 2
        assert message in outcome.message
        assert "Traceback" not in outcome.err
        assert not output.exists()

    @pytest.mark.parametrize("kind", BAD_DATA)
    def test_data(self, train, tmp_path, kind):
        text, message = BAD_DATA[kind]
        data = tmp_path / "bad.jsonl"
        data.write_text(text, encoding="utf-8")
        outcome = train(data=data)
        self.check(outcome, f"fused-dpo: {message.format(data=data)}", tmp_path / "run")
        held_out = train(eval_data=data)
        self.check(held_out, message.format(data=data), tmp_path / "run")

    @pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere.parquet", "no/such/folder/"])
    @pytest.mark.parametrize("option", ["data", "eval_data"])
    def test_missing_data(self, train, tmp_path, name, option):
        outcome = train(**{option: name})
        self.check(outcome, f"fused-dpo: {name}: no such file or folder", tmp_path / "run")

    def test_bad_rows_can_be_skipped(self, train, tmp_path):
        rows = [*GOOD, {"prompt": "a"}, *toy_rows(6)[3:]]
        outcome = train(data=write_rows(tmp_path / "some.jsonl", rows), skip_bad_rows=True)
        assert outcome.status == 0
        assert "6 pairs of 7 rows" in outcome.err
        assert "1 missing key" in outcome.err

    def test_nothing_left_to_train_on(self, train, tmp_path):
        data = write_rows(tmp_path / "none.jsonl", [{"prompt": "a"}])
        outcome = train(data=data, skip_bad_rows=True)
        self.check(outcome, "no usable pair is left of 1 rows: 1 missing key", tmp_path / "run")

    def test_one_prompt_cannot_be_split(self, train, tmp_path):
        data = write_rows(tmp_path / "one.jsonl", [PAIR, {**PAIR, "chosen": "d"}])
        outcome = train(data=data, eval_fraction=0.5)
        self.check(outcome, "needs at least two different prompts", tmp_path / "run")

    def test_conversations_without_a_template(self, train, tmp_path):
        tokenizer = byte_tokenizer()
        folder = save_folder(tmp_path / "model", tokenizer=None)
        tokenizer.save_pretrained(folder)
        for path in folder.glob("*"):
            if path.name == "chat_template.jinja":
                path.unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        messages = {name: [{"role": role, "content": name}] for name, role in
                    (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}  # fmt: skip
        data = write_rows(tmp_path / "chats.jsonl", [messages])
        self.check(train(model=folder, data=data), "--chat-template FILE", tmp_path / "run")
        template = tmp_path / "template.jinja"
        template.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
        assert train(model=folder, data=data, chat_template=template, max_steps=1).status == 0

    @pytest.mark.parametrize("content", [None, b"\xff\xfe{{", b"{% for %}"], ids=["missing", "not text", "not Jinja"])
    def test_chat_template(self, train, tmp_path, content):
        template = tmp_path / "template.jinja"
        if content is not None:
            template.write_bytes(content)
        chats = [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}]
        outcome = train(data=write_rows(tmp_path / "chats.jsonl", chats), chat_template=template)
        self.check(outcome, "template", tmp_path / "run")

    def test_missing_model(self, train, tmp_path):
        outcome = train(model=tmp_path / "nowhere")
        self.check(outcome, f"model folder {tmp_path / 'nowhere'} does not exist", tmp_path / "run")

    def test_missing_reference_model(self, train, tmp_path):
        outcome = train(ref_model=tmp_path / "nowhere")
        self.check(outcome, f"model folder {tmp_path / 'nowhere'} does not exist", tmp_path / "run")

    def test_model_without_tokenizer(self, train, tmp_path):
        folder = save_folder(tmp_path / "model", tokenizer=None)
        outcome = train(model=folder)
        self.check(outcome, f"no tokenizer could be loaded from {folder}", tmp_path / "run")
        assert "tokenizer.json" in outcome.message

    def test_model_without_weights(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        (folder / "model.safetensors").unlink()
        self.check(train(model=folder), f"could be loaded from {folder}", tmp_path / "run")

    def test_model_without_configuration(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        (folder / "config.json").unlink()
        self.check(train(model=folder), str(folder), tmp_path / "run")

    def test_model_with_a_broken_configuration(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        (folder / "config.json").write_text("{")
        self.check(train(model=folder), str(folder), tmp_path / "run")

    @pytest.mark.parametrize(
        ("family", "changes"),
        [("bloom", {}), ("gptj", {}), ("mamba", {}), ("llama", {"logits_scaling": 2.0})],
    )
    def test_model_that_cannot_be_packed(self, train, tmp_path, family, changes):
        folder = save_folder(tmp_path / "model", family, **changes)
        self.check(train(model=folder), "fused-dpo: ", tmp_path / "run")

    @pytest.mark.parametrize("option", ["model", "ref_model"])
    def test_tokenizer_of_another_model(self, train, tmp_path, option):
        folder = save_folder(tmp_path / "model", vocab_size=60)
        self.check(train(**{option: folder}), "60 embeddings", tmp_path / "run")

    def test_max_length_beyond_the_model(self, train, tmp_path):
        outcome = train(max_length=200, tokens_per_batch=400)
        self.check(outcome, "max-length 200 exceeds the 128 positions", tmp_path / "run")
        assert "--max-length 128 or less" in outcome.message

    @pytest.mark.parametrize("max_length", [48, None])
    def test_max_length_beyond_the_reference(self, train, tmp_path, max_length):
        """Found before any model is loaded."""
        folder = save_folder(tmp_path / "short", max_position_embeddings=32)
        outcome = train(ref_model=folder, max_length=max_length)
        self.check(outcome, f"max-length 48 exceeds the 32 positions that {folder} has", tmp_path / "run")
        assert "training data" not in outcome.message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--lerning-rate", "1"], "--lerning-rate"),
            (["--loss-type", "sigmod"], "did you mean 'sigmoid'?"),
            (["--tokens-per-batch", "95"], "2 x max-length = 96 tokens, more than tokens-per-batch = 95"),
            (["--tokens-per-batch", "3"], "tokens-per-batch must be at least 4, got 3"),
            (["--dtype", "int8"], "--dtype"),
            (["--config", "nowhere.yaml"], "--config needs an existing YAML file, got 'nowhere.yaml'"),
        ],
        ids=str,
    )
    def test_options(self, train, tmp_path, arguments, message):
        self.check(train(*arguments), message, tmp_path / "run")

    def test_no_cuda(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.check(train(device="cuda"), "use --device cpu", tmp_path / "run")

    def test_a_reference_that_gives_no_numbers(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        model.save_pretrained(folder)
        outcome = train(ref_model=folder)
        self.check(outcome, "gives no finite log-prob to", tmp_path / "run")
        assert "toy.jsonl:" in outcome.message


class TestOutput:
    """What stands in the output folder is safe from everything but a run that really begins."""

    @pytest.fixture
    def finished(self, train, tmp_path) -> dict[str, bytes]:
        """A run in `tmp_path / "run"`, file by file."""
        assert train().status == 0
        return snapshot(tmp_path / "run")

    def test_a_run_is_not_written_over(self, train, tmp_path, finished):
        outcome = train(seed=1)
        assert outcome.status == 2
        assert f"{tmp_path / 'run'} already holds a run" in outcome.message
        assert "--overwrite" in outcome.message
        assert snapshot(tmp_path / "run") == finished

    @pytest.mark.parametrize("what", ["data", "model", "weights", "option", "vocabulary", "interruption"])
    def test_overwrite_waits_until_all_is_well(self, train, tmp_path, finished, what, monkeypatch):
        settings: dict[str, Any] = {"overwrite": True, "seed": 1}
        if what == "data":
            settings["data"] = write_rows(tmp_path / "bad.jsonl", [*GOOD, {}])
        elif what == "model":
            settings["model"] = tmp_path / "nowhere"
        elif what == "weights":
            settings["model"] = save_folder(tmp_path / "model")
            (tmp_path / "model" / "model.safetensors").unlink()
        elif what == "option":
            settings["beta"] = -1
        elif what == "vocabulary":
            settings["model"] = save_folder(tmp_path / "model", vocab_size=60)
        else:
            monkeypatch.setattr("fused_dpo_engine.run.self_test", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(**settings).status == (130 if what == "interruption" else 2)
        assert snapshot(tmp_path / "run") == finished

    def test_other_files_are_left_alone(self, train, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        assert train().status == 0
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("below", [False, True])
    def test_output_is_a_file(self, train, tmp_path, below):
        file = tmp_path / "file"
        file.write_text("mine")
        outcome = train(output=file / "run" if below else file)
        assert outcome.status == 2
        assert str(file) in outcome.message
        assert "Traceback" not in outcome.err
        assert file.read_text() == "mine"

    @pytest.mark.parametrize(
        "output", ["/proc/nowhere/run", "{tmp_path}/" + 300 * "x" + "/run"], ids=["denied", "name"]
    )
    def test_output_that_cannot_be_created(self, train, tmp_path, output, monkeypatch):
        """Found before anything is loaded."""
        loaded = []
        monkeypatch.setattr("fused_dpo_engine.run.load_tokenizer", lambda *_: loaded.append(1))
        outcome = train(output=output.format(tmp_path=tmp_path))
        assert outcome.status == 2
        assert "fused-dpo: --output " in outcome.message
        assert "cannot be written" in outcome.message
        assert "Traceback" not in outcome.err
        assert not loaded
        assert list(tmp_path.iterdir()) == []

    def test_output_that_cannot_be_written(self, train, tmp_path, monkeypatch):
        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "run").mkdir()
        monkeypatch.setattr("tempfile.TemporaryFile", denied)
        outcome = train()
        assert outcome.status == 2
        assert f"--output {tmp_path / 'run'} cannot be written: Permission denied; give another" in outcome.message
        assert list((tmp_path / "run").iterdir()) == []


def test_as_a_process(tiny_llama, toy_settings, tmp_path):
    """As a user runs it, with nothing of this process."""
    config = tmp_path / "settings.yaml"
    config.write_text("learning_rate: 5e-4\npairs-per-step: 4\nseed: 5\n")
    settings = {**toy_settings, "learning_rate": None, "pairs_per_step": None, "output": tmp_path / "run"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT / "engine"))),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "fused_dpo_engine", "train", *options(config=config, **settings)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    resolved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (resolved["learning_rate"], resolved["pairs_per_step"], resolved["seed"]) == (5e-4, 4, 5)
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert metrics[0]["loss"] == FIRST_LOSS
    weights, start = read_weights(tmp_path / "run" / "model"), read_weights(tiny_llama)
    assert any(not torch.equal(weights[name], start[name]) for name in start)
