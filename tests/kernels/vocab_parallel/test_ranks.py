"""A head split over two and over four ranks, against one process: bits, errors, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_dpo.hardware import HAS_TRITON, has_bf16_units
from tests.fresh_process import run_ranks

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="the ranks also run the Triton kernels, interpreted"),
    pytest.mark.cpu_units,
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
RANKS = (2, 4)
WITHIN = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-7}
"""Of the largest entry. Gradients of the hidden states are added up in fp32 (float64) in another order, of at most 8192
columns; in bf16 they are rounded once more, and may fall on the other side."""
UNITS_OF_LOGITS = 2 * 2.0**-18
"""Two in the last place of logits up to 35: columns that are listed stand at other places of a tile on each number of
ranks, and the interpreter's products round by an element's place on some CPUs. So much their exponentials are off."""
IN_ORDER = ("logps", "dweight", "dbias", "dlora_b")
"""What has the bits of one process where ranks are split between two tiles."""
Found = dict[str, Any]


@pytest.fixture(scope="module")
def of_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Found]]:
    """What each of four ranks has found, by the number of ranks that the head was split over."""
    file = tmp_path_factory.mktemp("ranks") / "found"
    finished = run_ranks(4, "tests.kernels.support.vocab_ranks", file, TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stderr[-8000:]
    return [torch.load(f"{file}.{rank}", weights_only=False) for rank in range(4)]


def each(of_rank: list[dict[int, Found]], case: str) -> Iterator[Found]:
    """What every rank has found of a case, with two ranks and with four."""
    for found in of_rank:
        for ranks in RANKS:
            yield found[ranks][case]


@pytest.mark.parametrize("mode", ["exact", "filtered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ["borders", "everything"])
def test_bits_of_one_process(of_rank: list[dict[int, Found]], problem: str, dtype: torch.dtype, mode: str) -> None:
    """Log-probs and what is a gradient of the rows here, whatever the number of ranks; the rest within rounding."""
    coarse = mode == "filtered" and dtype == torch.bfloat16 and has_bf16_units(torch.device("cpu"))
    for found in each(of_rank, f"{problem} {dtype} {mode}"):
        assert found.pop("ranks agree")
        for name, (same, error) in found.items():
            if coarse and problem == "borders":  # one process alone screens by rounded logits, which move what is kept
                assert error <= {"logps": 1e-5, "dhidden": 0.02, "dweight": 0.02}.get(name, 0.1)
            elif name in IN_ORDER:
                assert same, (name, error)
            else:
                assert error <= (1e-5 if name in ("entropy", "tail") and dtype != torch.float64 else WITHIN[dtype]), (
                    name
                )


@pytest.mark.parametrize("mode", ["exact", "filtered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_split(of_rank: list[dict[int, Found]], dtype: torch.dtype, mode: str) -> None:
    """257 tokens in parts of 129 and 128, or of 65 and 62: other tiles, and other last bits."""
    for found in each(of_rank, f"odd {dtype} {mode}"):
        assert found.pop("ranks agree")
        for name in ("logps", "dhidden", "dweight"):
            assert found[name][1] <= WITHIN[dtype], name


@pytest.mark.parametrize("mode", ["exact", "filtered"])
@pytest.mark.parametrize("problem", ["borders", "everything"])
@pytest.mark.parametrize("impl", ["triton", "library"])
def test_kernels(of_rank: list[dict[int, Found]], impl: str, problem: str, mode: str) -> None:
    """The same of the Triton kernels. A library's first slice of four ranks is half of one process's."""
    for number, found in enumerate(each(of_rank, f"{impl} {problem} {mode}")):
        assert found.pop("ranks agree")
        other_screen = impl == "library" and mode == "filtered" and RANKS[number % 2] == 4
        for name, (same, error) in found.items():
            if name == "logps" or (name in IN_ORDER and not other_screen):
                assert same, (name, error)
            elif name in ("dhidden", "dweight") and other_screen:
                assert error <= 0.02
            elif name not in ("tail", "kept_fraction") or not other_screen:
                of_lists = name == "dhidden" and mode == "filtered"
                assert error <= (2e-6 + UNITS_OF_LOGITS if of_lists else 2e-6), name


def test_exponentials(of_rank: list[dict[int, Found]]) -> None:
    for found in each(of_rank, "exponentials"):
        assert found.pop("ranks agree")
        assert found["logps"][0]
        assert found["dweight"][0]
        assert found["dhidden"][1] <= 1e-6


def test_dtensors(of_rank: list[dict[int, Found]]) -> None:
    """`Shard(0)` and replicated ones are taken as they are, and their gradients are such again."""
    for found in each(of_rank, "DTensors"):
        assert all(found[name][0] for name in IN_ORDER)
        assert found["dlora_a"][1] <= 1e-6


def test_compiled(of_rank: list[dict[int, Found]]) -> None:
    for found in each(of_rank, "compiled"):
        assert found["logps"][0]
        assert found["dweight"][0]
        assert found["dhidden"][1] <= 1e-6


def test_nothing_scored(of_rank: list[dict[int, Found]]) -> None:
    for found in each(of_rank, "nothing scored"):
        assert all(same for same, _ in (found["logps"], found["dhidden"], found["dweight"]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("labels", "ValueError: the ranks that the head is split over disagree about their labels: "),
        ("invalid", "ValueError: labels must lie in [0, V) = [0, 257) "),
        ("reference", "ValueError: impl='reference' takes a head that is whole"),
        ("rows", " rows of a vocabulary of 300, and should hold "),
        ("columns", "ValueError: weight is a DTensor with placements (Shard(dim=1),) over ranks "),
    ],
)
def test_errors(of_rank: list[dict[int, Found]], case: str, message: str) -> None:
    """On every rank, so that none waits for the others."""
    for errors in each(of_rank, "errors"):
        assert message in errors[case]


def test_controls(of_rank: list[dict[int, Found]]) -> None:
    """What is left out shows: gradients of one rank's tokens alone, and a softmax over them alone."""
    for found in each(of_rank, "control: dH of one rank"):
        assert found["dhidden"][1] > 0.1
        assert not found["ranks agree"]
    assert any(not found["logps"][1] <= 0.1 for found in each(of_rank, "control: total of one rank"))
