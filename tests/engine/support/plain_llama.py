"""A Llama in the dtype of its weights throughout; transformers computes norms, softmax and angles in float32."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = Mapping[str, Tensor]


class PlainLlama:
    """One sequence of tokens to its logits.

    Args:
        weights: by the names of a model folder.
        adapters: of LoRA, by the names of an adapter folder; empty for none.
        scale: of the adapters, alpha / rank.
        config: of the model.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float, config: Any
    ) -> None:
        self.weights, self.adapters, self.scale, self.config = weights, adapters, scale, config

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute [T, V] from [T]."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for number in range(self.config.num_hidden_layers):
            layer = f"model.layers.{number}"
            x = x + self._attention(f"{layer}.self_attn", self._norm(f"{layer}.input_layernorm", x))
            x = x + self._mlp(f"{layer}.mlp", self._norm(f"{layer}.post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        lora = f"base_model.model.{name}.lora"
        if f"{lora}_A.weight" not in self.adapters:
            return y
        return y + self.scale * (x @ self.adapters[f"{lora}_A.weight"].T) @ self.adapters[f"{lora}_B.weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        size = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x / size * self.weights[f"{name}.weight"]

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        gated = silu(self._linear(f"{name}.gate_proj", x)) * self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", gated)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        width, count = self.config.head_dim, len(x)
        query, key, value = (
            self._linear(f"{name}.{part}_proj", x).view(count, -1, width).transpose(0, 1) for part in "qkv"
        )
        shared = len(query) // len(key)
        key, value = (part.repeat_interleave(shared, 0) for part in (key, value))
        scores = self._turned(query) @ self._turned(key).transpose(1, 2) / width**0.5
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self._linear(f"{name}.o_proj", mixed.transpose(0, 1).reshape(count, -1))

    def _turned(self, x: Tensor) -> Tensor:
        """Turn [heads, T, width] by rotary angles: the halves of a head are the parts of complex numbers."""
        half = x.shape[-1] // 2
        base = self.config.rope_parameters["rope_theta"]
        pace = base ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * pace
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
