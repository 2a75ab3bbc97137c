"""Tiny models, folders and data for the engine's tests, and the plain code that packed results are compared with."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GPTJForCausalLM, PreTrainedTokenizerFast

from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, plan_attention
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.training.summary import Summary

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared"
PREFERENCES, TOKENIZERS = SHARED / "data" / "preferences", SHARED / "tokenizers"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

VOCAB = 264
"""Bytes, special tokens, and a few ids that nothing uses."""
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A tiny decoder, in the words that most configurations share."""
NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "gpt2": NO_DROPOUT_GPT2,
    "gpt_neox": {"num_key_value_heads": None},
    "deepseek_v3": {  # values of another width than queries and keys
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
        **{"num_key_value_heads": 4, "v_head_dim": 12, "first_k_dense_replace": 2},
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
"""Model types that can be packed, and what sets each apart."""
IN_FLOAT32: dict[str, dict[str, Any]] = {
    "gpt_oss": {  # attention sinks
        **{"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gptj": {
        **{"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 4},
        **dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size")),
    },
}
"""More of them, which transformers computes in float32 at most: experts of the one, scores of the other."""
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"num_key_value_heads": None, "head_dim": None},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_key_value_heads": None, "head_dim": None},
    "mamba": {"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None, "state_size": 4},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2},
}
"""Model types that cannot."""
if not GPTJForCausalLM._supports_attention_backend:  # before transformers 5.24
    REFUSED["gptj"] = IN_FLOAT32.pop("gptj")


def tiny_config(family: str, **changes: Any) -> Any:
    """A fresh configuration: two models built from one object would share their choice of attention."""
    special = {**FAMILIES, **IN_FLOAT32, **REFUSED}.get(family, {})
    values = {**SIZE, **special, **changes}
    return AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not None})


def tiny_model(
    family: str = "llama",
    *,
    attention: str = ATTENTION_NAME,
    dtype: torch.dtype = torch.float64,
    scale: float = 8.0,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A random model in train mode, its matrices enlarged by `scale`.

    As usually initialised attention is nearly uniform, and a wrong mask hardly shows. Biases and norms are made random.
    """
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter *= scale
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).train()


def eager_twin(model: Any) -> Any:
    """A model with the same weights that attends through transformers' own plainest code."""
    twin: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    twin.to(model.dtype).load_state_dict(model.state_dict())
    return twin.eval()


def own_logps(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Log-probs [2B] by the model's own forward and full logits, one sequence at a time."""
    sums = []
    for pair in pairs:
        for ids, positions in pair.sides:
            tokens = torch.from_numpy(ids.astype(np.int64))
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            token_logps = logits.double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            sums.append(token_logps[positions - 1].sum())
    return torch.stack(sums)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    """Gradient of `value` by every trainable parameter."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(value, list(named.values()))
    return dict(zip(named, grads, strict=True))


def worst_gradient_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's gradient, a thousandth of the largest gradient counting as zero."""
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(g.norm()) for g in expected.values())
    return max(float((got[name] - g).norm() / (g.norm() + floor)) for name, g in expected.items())


def make_pair(prompt: int, chosen: int, rejected: int, *, seed: int = 0, where: str = "pairs.jsonl:1") -> TokenPair:
    """A pair of random tokens, so many in its prompt and in each response."""
    ids = np.random.default_rng(seed).integers(len(SPECIAL_TOKENS), VOCAB, prompt + chosen + rejected).astype(np.int32)
    head, rest = ids[:prompt], ids[prompt:]
    return TokenPair(
        prompt, np.concatenate((head, rest[:chosen])), np.concatenate((head, rest[chosen:])), where
    )  # fmt: skip


def make_pairs(*shapes: tuple[int, int, int]) -> list[TokenPair]:
    """Pairs of the given (prompt, chosen, rejected) lengths, from rows 1, 2, ..."""
    return [make_pair(*shape, seed=i, where=f"pairs.jsonl:{i}") for i, shape in enumerate(shapes, start=1)]


few = st.lists(st.integers(0, 1), min_size=1, max_size=5)
"""Tokens of two kinds, so that prompts are equal, responses begin alike and one extends the other."""


@st.composite
def any_pairs(draw) -> list[TokenPair]:
    """Pairs of all shapes, all or some of their tokens scored; of a rare one the sequences begin with other tokens."""
    pairs = []
    for prompt, chosen, rejected, odd, step in draw(
        st.lists(st.tuples(few, few, few, st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6)
    ):
        other = [1 - prompt[0], *prompt[1:]] if odd == 0 else prompt
        sides = (np.array(prompt + chosen, np.int32), np.array(other + rejected, np.int32))
        some = [np.arange(len(prompt), len(ids), step) if step else None for ids in sides]
        where = f"x:{len(pairs) + 1}"
        pairs.append(TokenPair(len(prompt), *sides, where, chosen_scored=some[0], rejected_scored=some[1]))
    return pairs


def unshared_plan(*offsets: int) -> AttentionPlan:
    """Segments between the offsets that share nothing."""
    return plan_attention([Segment(*edges, at, 0) for at, edges in enumerate(pairwise(offsets))])


def set_attention(monkeypatch: Any, function: Callable[..., Any]) -> None:
    """Put another function under the name that packed models attend through."""
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, function)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, an EOS token, and a chat template."""
    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHATML,
    )


def save_folder(folder: Path, family: str = "llama", *, tokenizer: Any = "bytes", **settings: Any) -> Path:
    """A model folder with a random model of `tiny_model` in float32, and a tokenizer unless that is None."""
    settings = {"scale": 2.0, "attention": "eager", "dtype": torch.float32, **settings}
    tiny_model(family, **settings).save_pretrained(folder)
    if tokenizer is not None:
        (byte_tokenizer() if tokenizer == "bytes" else tokenizer).save_pretrained(folder)
    return folder


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def toy_rows(count: int) -> list[dict[str, str]]:
    """Preferences that can be learned, yes over no, in all lengths."""
    return [
        {"prompt": f"is {'it ' * (i % 5)}{i}? ", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i * 7 % 5)}
        for i in range(count)
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(**settings: Any) -> list[str]:
    """Settings by name as command-line options; None is left out."""
    arguments = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            arguments += [f"--{option}", *map(str, value)]
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    return arguments


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


@dataclass
class Run:
    """A finished run and its folder."""

    output: Path
    summary: Summary

    @property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.output)

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics]

    def weights(self, name: str = "model") -> dict[str, Tensor]:
        return read_weights(self.output / name)


def read_metrics(output: Path) -> list[dict[str, float]]:
    """One object a line."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all weights."""
    assert got.keys() == expected.keys()
    return max(float((got[name].double() - expected[name].double()).abs().max()) for name in got)
