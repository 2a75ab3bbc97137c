"""`python -m benchmarks.screens`: what a coarse screen costs in accuracy."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import screens
from benchmarks.heads.replay import SHARED_HIDDEN, TENSORS, Replay
from benchmarks.reporting import records
from benchmarks.screens import Coarse, e4m3, hadamard, int8, prepared, projected, rows_of
from tests.benchmarks.command_lines import refusal


@pytest.fixture
def problem() -> Replay:
    """Peaked logits over 300 columns, two sequences, the second longer than a block."""
    hidden, weight = torch.randn(150, 64), torch.randn(300, 64)
    hidden[:, 3] *= 20.0  # an outlier channel, and a mean
    hidden[:, 5] += 4.0
    target = (hidden @ weight.T).argmax(1)
    return Replay(hidden.bfloat16(), weight.bfloat16(), target, torch.tensor([0, 10, 150]), "made up")


@pytest.mark.parametrize("quantise", [e4m3, int8])
def test_quantised_rows(quantise: screens.Quantise) -> None:
    x = torch.randn(5, 200) * torch.tensor([[1e-3], [1.0], [7.0], [1e4], [0.3]])
    rounded = quantise(x)
    largest = x.abs().amax(1, keepdim=True)
    # Half a step: of e4m3's three bits after the point, or of its subnormal numbers; of int8's grid.
    half_step = torch.maximum(x.abs() / 16, largest / 448 * 2**-10) if quantise is e4m3 else largest / 254
    assert ((rounded - x).abs() <= half_step * 1.001).all()
    assert all(len(row.unique()) <= 255 for row in rounded)
    assert (rounded != x).any()


def test_hadamard_is_orthogonal() -> None:
    assert torch.allclose(hadamard(64) @ hadamard(64).T, torch.eye(64), atol=1e-6)


@pytest.mark.parametrize("prepare", [prepared, partial(prepared, balanced=True), projected])
def test_preparation_alone_changes_nothing(prepare: Callable[..., Coarse], problem: Replay) -> None:
    hidden, weight = problem.hidden.double(), problem.weight.double()

    def unchanged(x: Tensor) -> Tensor:
        return x

    got = prepare(hidden.float(), weight.float(), unchanged).logits(slice(0, 150))
    true = hidden @ weight.T
    assert (got - true).abs().max() < 1e-4 * true.abs().max()  # fp32 sums of 64 products


def test_projected_depends_on_no_other_row(problem: Replay) -> None:
    """A control: the batch's mean gives each row other errors in another batch."""
    hidden, weight, rows = problem.hidden.float(), problem.weight.float(), slice(0, 10)
    alone, together = (projected(h, weight, int8).logits(rows) for h in (hidden[rows], hidden))
    assert (alone - together).abs().max() < 1e-5 * together.abs().max()  # one may be summed in another order
    alone, together = (prepared(h, weight, int8).logits(rows) for h in (hidden[rows], hidden))
    assert (alone - together).abs().max() > 1e-3 * together.abs().max()


def test_rows(problem: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exact screen has no error, a coarser one more than a finer; what is kept and missed is counted."""

    def noisy(size: float) -> screens.Callable[[Tensor, Tensor], Coarse]:
        return lambda h, w: Coarse(h + size * torch.randn(h.shape, generator=torch.Generator().manual_seed(0)), w)

    monkeypatch.setattr(screens, "SCREENS", {"exact": noisy(0.0), "fine": noisy(0.02), "rough": noisy(0.2)})
    rows = {row["implementation"]: row for row in rows_of(problem)}
    exact, fine, rough = (rows[f"{name}, above 2^-12 / 1"] for name in ("exact", "fine", "rough"))
    assert exact["missed_fraction"] == exact["largest_missed_over_eps"] == 0
    assert exact["worst_logp_error_nat"] < 1e-5  # fp32 logits
    assert exact["logit_error_rms_nat"] < 1e-5 < fine["logit_error_rms_nat"] < rough["logit_error_rms_nat"]
    assert exact["worst_logp_error_nat"] < fine["worst_logp_error_nat"] < rough["worst_logp_error_nat"]
    assert rough["missed_fraction"] > 0
    assert rough["largest_missed_over_eps"] > 1
    wider = rows["rough, above 2^-12 / 4"]
    assert wider["missed_fraction"] < rough["missed_fraction"]
    assert wider["kept_fraction"] > rough["kept_fraction"]

    p = (problem.hidden.double() @ problem.weight.double().T).softmax(1)
    blocks = [p[:10], p[10:138], p[138:]]  # of a sequence, 128 rows at most
    kept = [float(block.amax(0).gt(2**-12).double().mean()) for block in blocks]
    assert exact["kept_fraction"] == pytest.approx(sum(kept) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "argument --tokens: must be at least 1, got 0"),
        (["--tokens", "-5"], "argument --tokens: must be at least 1, got -5"),
        (["--hidden", "no such file"], "no such file is not there"),
        (["--hidden", "README.md"], "README.md is no safetensors file"),
        ([], "errors of made-up logits would tell nothing"),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(screens, "SHARED_HIDDEN", tmp_path / "nothing")
    monkeypatch.chdir(Path(__file__).parents[2])
    assert message in refusal(screens.main, ["--out", str(tmp_path / "a.json"), *arguments], capsys)


def test_hidden_states_of_a_larger_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({name: torch.zeros(4, 600) for name in TENSORS}, tmp_path / "large.safetensors")
    arguments = ["--out", str(tmp_path / "a.json"), "--hidden", str(tmp_path / "large.safetensors")]
    assert "has hidden size 600, more than the 576 wanted" in refusal(screens.main, arguments, capsys)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not SHARED_HIDDEN.is_file():
        pytest.skip("needs real hidden states in ../shared/data/hidden")
    assert screens.main(["--out", str(tmp_path / "a.json"), "--tokens", "40"]) == 0
    rows = records.read(tmp_path / "a.json").rows
    assert len(rows) == len(screens.SCREENS) * len(screens.MARGINS)
    assert "int8, centred, rotated, above 2^-12 / 1" in capsys.readouterr().out
