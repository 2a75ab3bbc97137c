"""Where turns stand among the tokens: found by tokenizing a little again, as by tokenizing every beginning."""

import random
from functools import cache

import numpy as np
import pytest
from transformers import AutoTokenizer

from fused_dpo_engine.data import encoding
from fused_dpo_engine.data.encoding import encode
from fused_dpo_engine.data.pairs import common_prefix
from fused_dpo_engine.data.rendering import Rendered
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.fuzz import TEXTS
from tests.engine.support.templates import CHATML, GEMMA
from tests.engine.support.tokenization import bpe_tokenizer, make_rows
from tests.engine.support.toys import TOKENIZERS, assistant, byte_tokenizer, user


@cache
def tokenizer_of(name):
    if name in ("bytes", "merges"):
        return byte_tokenizer() if name == "bytes" else bpe_tokenizer()
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"{TOKENIZERS / name} is not here")
    return AutoTokenizer.from_pretrained(str(TOKENIZERS / name))


@pytest.mark.parametrize("name", ["bytes", "merges", "gpt2", "qwen2.5"])
def test_edges_anywhere(name):
    """Also within special tokens, between a letter and its accent, and in the middle of words."""
    tokenizer, draw = tokenizer_of(name), random.Random(0)
    sound = [text[:50] for text in TEXTS if text.isprintable() or text.isspace()]
    again = 0
    for _ in range(60):
        text = "".join(draw.choice([*sound, "the prompt ", "answer"]) for _ in range(30))
        edges = sorted(draw.randint(0, len(text)) for _ in range(8))
        item = Rendered(
            (text, text + "x"), "", ([*zip(edges[::2], edges[1::2], strict=True)], None), False, "x:1", None
        )
        (row,) = encode([item], tokenizer)
        whole = row.answers[0]
        beginnings = tokenizer([text[:edge] for edge in edges], add_special_tokens=False).input_ids
        assert row.edges == [[common_prefix(whole, np.array(ids)) for ids in beginnings], None]
        again += sum(map(len, beginnings))
    assert again > 10_000


def test_a_long_conversation_is_tokenized_a_little_more_than_once(monkeypatch):
    said = [m for i in range(40) for m in (assistant(f"answer {i}"), user(f"question {i}"))][:-1]
    rows = make_rows({"prompt": [user("What?")], "chosen": said, "rejected": "no"})
    tokenized, whole = [], 0
    own = encoding._tokenize

    def count(texts, *arguments, **more):
        tokenized.append(sum(map(len, texts)))
        return own(texts, *arguments, **more)

    monkeypatch.setattr(encoding, "_tokenize", count)
    (pair,) = tokenize_pairs(rows, byte_tokenizer(), max_length=100_000, chat_template=CHATML).pairs
    whole = len(byte_tokenizer().decode(pair.chosen_ids))
    assert sum(tokenized) < 6 * whole  # the whole, and for each of 80 edges a turn or two


def test_without_special_tokens_it_is_limited(monkeypatch):
    said = [m for i in range(40) for m in (assistant(f"answer {i}"), user(f"question {i}"))][:-1]
    rows = make_rows({"prompt": [user("What?")], "chosen": said, "rejected": "no"})
    settings = {"max_length": 100_000, "chat_template": GEMMA}
    assert len(tokenize_pairs(rows, byte_tokenizer(), **settings).pairs) == 1
    monkeypatch.setattr(encoding, "MOST_AGAIN", 10_000)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*too many turns for them to be found among its tokens"):
        tokenize_pairs(rows, byte_tokenizer(), **settings)
