"""The command on input that cannot be used: what it says, and that it leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.support.toys import Outcome, byte_tokenizer, save_folder, toy_rows, write_rows

GOOD = toy_rows(3)


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
    "null for text": (jsonl(PAIR, {**PAIR, "rejected": None}), '{data}:2: a row needs "chosen" and "rejected"'),
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
        self.check(train(model=folder), f"{folder} has neither model.safetensors nor", tmp_path / "run")

    def test_model_without_configuration(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        (folder / "config.json").unlink()
        self.check(train(model=folder), str(folder), tmp_path / "run")

    def test_model_with_a_broken_configuration(self, train, tmp_path):
        folder = save_folder(tmp_path / "model")
        (folder / "config.json").write_text("{")
        self.check(train(model=folder), str(folder), tmp_path / "run")

    @pytest.mark.parametrize("family", ["bloom", "gpt_neo", "mamba"])
    def test_model_that_cannot_be_packed(self, train, tmp_path, family):
        folder = save_folder(tmp_path / "model", family)
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
        torch.nn.init.constant_(model.model.norm.weight, 3e38)  # a number, of which others become none
        model.save_pretrained(folder)
        outcome = train(ref_model=folder)
        self.check(outcome, "gives no finite log-prob to", tmp_path / "run")
        assert "toy.jsonl:" in outcome.message
