"""Rows, small tokenizers of several kinds, and what must hold of every token pair."""

from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fused_dpo_engine.data.formats import Row
from fused_dpo_engine.data.tokenization import tokenize_pairs
from tests.engine.support.toys import CHATML


def make_rows(*values):
    return [Row(value, f"pairs.jsonl:{number}") for number, value in enumerate(values, start=1)]


def strings(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize_one(values, tokenizer, max_length=100, **settings):
    (pair,) = tokenize_pairs(make_rows(values), tokenizer, max_length=max_length, **settings).pairs
    return pair


@cache
def bpe_tokenizer(bos=False, eos=False, has_eos=True):
    """Byte-level BPE with some merges; `bos` and `eos`: the tokenizer puts them around a text itself."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the prompt and the answer 你好吗 我很好 aab abab ba" * 4] * 4, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        model.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokens = {"bos_token": "<s>"} if bos else {}
    if has_eos:
        tokens["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


@cache
def chat_tokenizer(bos=False, eos=False):
    """`bpe_tokenizer` with a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer(bos, eos).backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def letter_tokenizer():
    """One token a letter but for "ab" and "cd", and no special tokens."""
    vocab = {letter: index for index, letter in enumerate("abcdefgh")} | {"ab": 8, "cd": 9}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")]))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def decode(tokenizer, ids):
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def scored(tokenizer, pair):
    return tuple(decode(tokenizer, ids[pair.prompt_length :]) for ids in (pair.chosen_ids, pair.rejected_ids))


def assert_sound(pair, max_length):
    assert pair.prompt_length >= 1
    assert min(pair.chosen_length, pair.rejected_length) >= 1
    assert max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length
    assert pair.chosen_ids.dtype == pair.rejected_ids.dtype == np.int32
    assert pair.chosen_ids[: pair.prompt_length].tolist() == pair.rejected_ids[: pair.prompt_length].tolist()
    assert pair.chosen_ids.tolist() != pair.rejected_ids.tolist()
