"""What the project takes the CPU to be able to do, in fresh processes, as the answer is kept for the process."""

from collections.abc import Iterator

import pytest
import torch
from torch._inductor.codecache import compiled_fx_graph_hash

from fused_dpo.hardware import (
    ISA_VARIABLES,
    ISAS_WITH_BF16,
    ISAS_WITHOUT_BF16,
    bf16_allowed,
    has_bf16_units,
    tag_compiled_code,
)
from tests.fresh_process import run

pytestmark = pytest.mark.cpu_units

ONEDNN, OLD_NAME = ISA_VARIABLES
CPU = torch.device("cpu")
UNITS = "import torch; from fused_dpo.hardware import has_bf16_units; print(has_bf16_units(torch.device('cpu')))"


def has_units(**variables: str) -> str:
    """What a fresh process says with these variables, and no other mask: an empty one is as good as none."""
    return run(UNITS, variables={**dict.fromkeys(ISA_VARIABLES, ""), **variables}).strip()


@pytest.fixture
def no_mask(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without a mask, and no answer kept before the test or after it."""
    for variable in ISA_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    has_bf16_units.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    has_bf16_units.cache_clear()


@pytest.mark.parametrize("variable", ISA_VARIABLES)
def test_a_masked_process_has_no_units(variable: str) -> None:
    assert has_units(**{variable: "AVX2"}) == "False"


def test_control_an_unmasked_process_has_what_the_cpu_has() -> None:
    """So it is the mask that takes the units away, on machines that have some."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert has_units() == has_units(ONEDNN_MAX_CPU_ISA="ALL") == str(has)


@pytest.mark.parametrize("isa", [*ISAS_WITHOUT_BF16, *ISAS_WITH_BF16])
def test_every_instruction_set_has_an_answer(no_mask: pytest.MonkeyPatch, isa: str) -> None:
    no_mask.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    no_mask.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    no_mask.setenv(ONEDNN, isa.lower())
    assert has_bf16_units(CPU) is bf16_allowed() is (isa in ISAS_WITH_BF16)


def test_the_first_variable_counts(no_mask: pytest.MonkeyPatch) -> None:
    no_mask.setenv(OLD_NAME, "AVX2")
    assert not bf16_allowed()
    no_mask.setenv(ONEDNN, "ALL")
    assert bf16_allowed()
    no_mask.setenv(ONEDNN, "")  # as good as unset
    assert not bf16_allowed()


@pytest.mark.parametrize("variable", ISA_VARIABLES)
def test_an_unknown_instruction_set_is_an_error(no_mask: pytest.MonkeyPatch, variable: str) -> None:
    no_mask.setenv(variable, "AVX3")
    choices = ", ".join((*ISAS_WITHOUT_BF16, *ISAS_WITH_BF16))
    with pytest.raises(ValueError, match=f"{variable}=AVX3 names no instruction set; .* choose one of {choices}"):
        has_bf16_units(CPU)


@pytest.mark.parametrize("units", [True, False])
def test_the_answer_can_be_overruled(no_mask: pytest.MonkeyPatch, units: bool) -> None:
    """By what torch says of the CPU, so that the tests can have either kind."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        no_mask.setattr(torch.cpu, name, lambda: units)
    no_mask.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert has_bf16_units(CPU) is units


def test_other_devices(no_mask: pytest.MonkeyPatch) -> None:
    no_mask.setenv(ONEDNN, "AVX2")  # says nothing about a GPU
    no_mask.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert has_bf16_units(torch.device("cuda"))
    assert not has_bf16_units(torch.device("mps"))


def test_compiled_code_of_other_units_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the key that inductor keeps the code of a graph under. Control: under the same units it is found."""
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())

    def key(units: str) -> str:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
        with torch.compiler.config.patch(cache_key_tag=""):  # pyright: ignore[reportAttributeAccessIssue]
            tag_compiled_code()
            return compiled_fx_graph_hash(graph, [torch.ones(3)], {}, [])[0]  # pyright: ignore[reportArgumentType]

    assert key("AVX2") == key("AVX2") != key("AVX512")


def test_a_users_own_tag_stays() -> None:
    units = torch.backends.cpu.get_cpu_capability()
    with torch.compiler.config.patch(cache_key_tag="mine"):  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(2):
            tag_compiled_code()
            assert torch.compiler.config.cache_key_tag == f"mine {units}"
