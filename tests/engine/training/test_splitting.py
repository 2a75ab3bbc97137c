"""Memory that runs out in a forward pass: the step is taken again with that pass in two, where it is the same step."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo_engine.errors import OutOfMemoryError
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import training_forward
from tests.engine.support.toys import Run, largest_difference, save_folder, write_rows

ROOM: dict[str, Any] = {"max_steps": 4, "tokens_per_batch": 400, "learning_rate": 3e-2, "adam_epsilon": 1e-2}
"""All pairs of a step in one pass, and damped updates: Adam turns rounding of tiny gradients into whole updates."""
CLOSE_WEIGHTS = 1e-6
"""Ten units in the last place of the largest, those of the norms, which are around 1."""
SAME = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "lengths/gap")
"""Metrics of a step that are the same within rounding, however it is split."""


class SmallDevice:
    """A device on which forward passes of more than so many slots do not fit."""

    def __init__(self, limit: float, *, backward: bool) -> None:
        self.limit, self.backward = limit, backward
        """Whether it fails late in the backward pass, when most gradients are there, or after the forward pass."""
        self.tried: list[int] = []
        self.failed: list[int] = []
        self.held: list[weakref.ref[Tensor]] = []
        """What failed passes have made."""
        self.left: list[int] = []
        """Of it, what is still there at the next pass."""
        self._hook: Any = None

    def __call__(self, policy: Policy, batch: Any, logps: Tensor) -> Tensor:
        """Take part in a forward pass of training."""
        slots = batch.num_slots
        self.left.append(sum(tensor() is not None for tensor in self.held))
        self.tried.append(slots)
        if self._hook is not None:
            self._hook.remove()
        if slots > self.limit:
            self.held.append(weakref.ref(logps))
            if not self.backward:
                self.fail(slots)
            first = next(parameter for parameter in policy.parameters() if parameter.requires_grad)
            self._hook = first.register_hook(lambda _: self.fail(slots))
        return logps

    def fail(self, slots: int) -> None:
        self.failed.append(slots)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")


@contextmanager
def small_device(limit: float, *, backward: bool = False) -> Iterator[SmallDevice]:
    """Train on one within the block, in which a step is split."""
    device = SmallDevice(limit, backward=backward)
    with pytest.MonkeyPatch.context() as patch:
        training_forward(patch, device)
        with pytest.warns(UserWarning, match="begins anew"):
            yield device


@pytest.fixture
def trainers(monkeypatch) -> list[Trainer]:
    """Those that are made in the test."""
    made: list[Trainer] = []
    build = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *more: build(self, *more) or made.append(self))
    return made


class TestSplit:
    @pytest.mark.parametrize("backward", [False, True], ids=["in forward", "in backward"])
    @pytest.mark.parametrize(
        "settings", [{}, {"packing": False}, {"lora_rank": 2, "sft_weight": 0.3}, {"loss_type": "ipo_norm"}], ids=str
    )
    def test_gives_the_step_that_fits(self, train_tiny, backward, settings):
        settings = {**ROOM, **settings}
        whole = train_tiny("whole", **settings)
        with small_device(100, backward=backward) as device:
            split = train_tiny("split", **settings)
        assert device.failed
        assert set(whole.column("micro_batches")) == {1}
        assert min(split.column("micro_batches")) >= 2
        assert largest_difference(split.weights(), whole.weights()) < CLOSE_WEIGHTS
        for name in SAME:
            assert split.column(name) == pytest.approx(whole.column(name), rel=1e-5, abs=1e-5), name
        for name in ("pairs", "tokens", "epoch", "learning_rate"):
            assert split.column(name) == whole.column(name), name
        assert abs(split.metrics[-1]["loss"] - split.metrics[0]["loss"]) > 1e-3, "the steps do something"

    def test_control_gradients_of_a_failed_attempt_would_be_seen(self, train_tiny, monkeypatch):
        whole = train_tiny("whole", **ROOM)
        accumulate = Trainer._accumulate

        def keeping(self: Trainer, *arguments: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(self.optimizer, "zero_grad", lambda: None)
                return accumulate(self, *arguments)

        monkeypatch.setattr(Trainer, "_accumulate", keeping)
        with small_device(100, backward=True):
            split = train_tiny("kept", **ROOM)
        assert largest_difference(split.weights(), whole.weights()) > 1000 * CLOSE_WEIGHTS

    def test_a_size_that_failed_is_not_tried_again(self, train_tiny, trainers, monkeypatch, recwarn):
        device = SmallDevice(60, backward=True)
        training_forward(monkeypatch, device)
        train_tiny(**{**ROOM, "max_steps": 8})
        assert device.failed == sorted(set(device.failed), reverse=True)
        assert len(device.failed) >= 2
        assert trainers[0].splitting.split_above == min(device.failed) - 1
        said = [str(warning.message) for warning in recwarn if "out of memory" in str(warning.message)]
        assert len(said) == len(device.failed), "once a size"
        for line, slots in zip(said, device.failed, strict=True):
            assert f"in a forward pass of {slots} tokens" in line
            assert f"--tokens-per-batch below {slots}" in line

    def test_a_resumed_run_does_not_try_either(self, train_tiny, monkeypatch):
        settings = {**ROOM, "checkpoint_every": 2}
        step = Trainer._step

        def stop(self: Trainer, number: int, *more: Any) -> Any:
            if number == 3:
                raise RuntimeError("stop")
            return step(self, number, *more)

        with small_device(60) as first, monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", stop)
            with pytest.raises(RuntimeError, match="stop"):
                train_tiny(**settings)
        assert first.failed
        second = SmallDevice(60, backward=False)
        training_forward(monkeypatch, second)
        assert [line["step"] for line in train_tiny(**settings, resume="auto").metrics] == [1, 2, 3, 4]
        assert max(second.tried) < min(first.failed)

    def test_what_the_failed_pass_held_is_free(self, train_tiny):
        gc.disable()  # so that nothing but the code itself lets go of it
        try:
            with small_device(100) as device:
                train_tiny(**ROOM)
        finally:
            gc.enable()
        assert device.failed
        assert set(device.left) == {0}

    def test_metrics_count_slots_once(self, train_tiny, tmp_path):
        """Of padded pairs of one length, whose halves take as many slots as the whole."""
        rows = [{"prompt": f"is it {i}? ", "chosen": "yes", "rejected": "non"} for i in range(8)]
        data = write_rows(tmp_path / "even.jsonl", rows)
        settings = {**ROOM, "packing": False, "pairs_per_step": 4, "data": data, "max_steps": 2}
        whole = train_tiny("whole", **settings)
        with small_device(2 * 28, backward=True):
            split = train_tiny("split", **settings)
        assert (whole.column("micro_batches"), split.column("micro_batches")) == ([1, 1], [2, 2])
        for name in ("tokens", "packing/padding", "packing/shared"):
            assert split.column(name) == whole.column(name)
        assert split.column("packing/fill") == [fill / 2 for fill in whole.column("packing/fill")]
        assert split.summary.tokens == whole.summary.tokens


class TestNotSplit:
    """The message of `explain_out_of_memory`, and no second attempt."""

    @pytest.mark.parametrize("settings", [{"loss_type": "bco_pair"}, {"loss_type": "aot"}, {"offload": True}], ids=str)
    def test_where_the_result_or_the_passes_would_change(self, train_tiny, monkeypatch, settings):
        """Losses that compare pairs; FSDP2, with one process too, whose layers stay gathered where a pass fails."""
        self.check(train_tiny, monkeypatch, **settings)

    def test_a_load_balancing_loss(self, train_tiny, monkeypatch, tmp_path):
        """It is no sum over rows: two halves have another."""
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
        self.check(train_tiny, monkeypatch, model=save_folder(tmp_path / "moe", "mixtral", **experts))

    def check(self, train_tiny: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        device = SmallDevice(60, backward=False)
        training_forward(monkeypatch, device)
        with pytest.raises(OutOfMemoryError, match=r"forward pass of \d+ tokens \(--tokens-per-batch 400\)"):
            train_tiny(**{**ROOM, **settings})
        assert len(device.tried) == 1

    def test_one_pair(self, train_tiny):
        """It comes after those that hold several have been split."""
        with small_device(10) as device, pytest.raises(OutOfMemoryError, match="in a forward pass of") as raised:
            train_tiny(**ROOM)
        assert f"of {device.failed[-1]} tokens" in str(raised.value)
        assert device.failed[-1] < device.failed[0]

    def test_one_ranking(self, train_tiny, tmp_path):
        """Its pairs are compared with each other."""
        rows = [{"prompt": f"{i}? ", "responses": ["a" * 9, "b" * 8, "c" * 7], "scores": [3, 2, 1]} for i in range(4)]
        settings = {"data": write_rows(tmp_path / "rankings.jsonl", rows), "loss_type": "plackett_luce"}
        with small_device(20) as device, pytest.raises(OutOfMemoryError, match="in a forward pass of"):
            train_tiny(**{**ROOM, **settings, "pairs_per_step": 8})
        assert len(device.tried) == 3, "four rankings, two, one"
