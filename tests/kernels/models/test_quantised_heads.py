"""`head_of` on heads whose weight is not the numbers that multiply the hidden states: refused by the layer's type."""

from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo import head_of

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class PackedLinear(nn.Module):
    """GPTQ's and AWQ's layers have no `weight`."""

    qweight = torch.zeros(4, 4, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_are_codes(dtype: torch.dtype) -> None:
    head = nn.Linear(4, 7)
    head.weight = nn.Parameter(torch.zeros(7, 4).to(dtype), requires_grad=False)
    with pytest.raises(NotImplementedError, match=rf"the head is a torch.*Linear, .* of {dtype}.*without its head"):
        head_of(Model(head))


def test_layers_without_a_weight() -> None:
    with pytest.raises(NotImplementedError, match=r"the head is a .*PackedLinear, which has no weight"):
        head_of(Model(PackedLinear()))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("skip", [["nothing"], None], ids=["head too", "all but the head"])
def test_bitsandbytes(tmp_path: Any, bits: int, skip: list[str] | None) -> None:
    pytest.importorskip("bitsandbytes", reason="quantises the weights")
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))
    source.save_pretrained(tmp_path)
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.float32
    )
    if skip is None:
        assert torch.equal(head_of(model).weight, source.lm_head.weight)
        return
    with pytest.raises(NotImplementedError, match=rf"bitsandbytes\..*Linear{bits}.*without its head"):
        head_of(model)
