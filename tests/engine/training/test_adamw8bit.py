"""AdamW in 8 bits: what its state takes, how close it stays to AdamW's steps, whole runs, shards, and its absence."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_dpo_engine.analysis.memory import EIGHT_BITS, SMALL
from fused_dpo_engine.config.options import OptimizerOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.training import adamw8bit
from fused_dpo_engine.training.optimizer import build_optimizer
from tests.engine.support.sharded_optimizer import network, train
from tests.fresh_process import run_ranks

pytest.importorskip("bitsandbytes", reason="needs the extra `qlora`")
pytestmark = pytest.mark.cpu_units


def fit(optimizer: str, steps: int = 60) -> list[float]:
    """Losses of a small network that learns another one."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    inputs = torch.randn(256, 64)
    targets = teacher(inputs).detach()
    options = OptimizerOptions(learning_rate=3e-3, optimizer=optimizer, lr_scheduler_type="constant")  # pyright: ignore
    stepper, _ = build_optimizer(layers.parameters(), options, steps)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layers(inputs), targets)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


def test_learns_as_adamw_does():
    """Every loss of the run within 3 % of AdamW's; it falls to a sixth meanwhile."""
    plain, coarse = fit("adamw"), fit("adamw8bit")
    assert plain[-1] < plain[0] / 6
    assert coarse != plain
    assert coarse == pytest.approx(plain, rel=0.03)


def state_bytes(parameter: nn.Parameter) -> int:
    optimizer, _ = build_optimizer([parameter], OptimizerOptions(optimizer="adamw8bit"), 10)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {name: value for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
    return sum(value.nbytes for name, value in tensors.items() if not name.startswith("qmap"))  # tables of all weights


def test_state_takes_two_bytes_a_weight_and_eight_of_a_small_one():
    assert state_bytes(nn.Parameter(torch.ones(512, 256))) == EIGHT_BITS * 512 * 256
    assert state_bytes(nn.Parameter(torch.ones(SMALL - 1))) == 8 * (SMALL - 1)
    assert 2 <= EIGHT_BITS < 2.05


def test_weight_decay_is_decoupled():
    parameter = nn.Parameter(torch.randn(128, 64))
    before = parameter.detach().clone()
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.5, warmup_ratio=0.0, optimizer="adamw8bit")
    optimizer, _ = build_optimizer([parameter], options, 10)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5))


def test_a_run(train_tiny):
    """Of the toy model the embeddings alone are large enough for 8 bits: the first steps are AdamW's within 1 %."""
    plain, coarse = train_tiny("plain"), train_tiny("coarse", optimizer="adamw8bit")
    assert coarse.column("loss") == pytest.approx(plain.column("loss"), rel=0.01)
    assert coarse.column("loss") != plain.column("loss")


def test_shards_of_fsdp2_take_the_same_steps(tmp_path: Path):
    """Where shards begin at a block, bit for bit."""
    done = run_ranks(2, "tests.engine.support.sharded_optimizer", tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr
    sharded, whole, start = torch.load(tmp_path / "weights.pt"), train(network()), dict(network().named_parameters())
    assert sharded.keys() == whole.keys()
    for name, weights in whole.items():
        assert torch.equal(sharded[name], weights), name
        assert not torch.equal(weights, start[name]), name


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(adamw8bit, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes: pip install 'fused-dpo\[qlora\]'"):
        build_optimizer([nn.Parameter(torch.ones(2))], OptimizerOptions(optimizer="adamw8bit"), 1)
    build_optimizer([nn.Parameter(torch.ones(2))], OptimizerOptions(), 1)
