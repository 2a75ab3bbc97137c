"""Training runs on several processes: torchrun ... -m tests.engine.support.ranks CASES; one process group for all."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.fresh_process import run_ranks


def run_cases(ranks: int, folder: Path, cases: dict[str, dict[str, Any]]) -> str:
    """Run `{name: {"options": [...], "change": a key of CHANGES or None}}`; what they said on stderr."""
    file = folder / f"{ranks}.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    finished = run_ranks(ranks, "tests.engine.support.ranks", file)
    assert finished.returncode == 0, finished.stderr[-8000:]
    return finished.stderr


def read_digests(ranks: int, folder: Path) -> dict[str, list[str]]:
    """Of each case that has been run on so many ranks, what `digest` says of the final weights on every rank."""
    return json.loads((folder / f"{ranks}.out").read_text(encoding="utf-8"))


def digest(parameters: Iterable[Any]) -> str:
    """Of all weights, bit for bit; of shards as a whole."""
    seen = hashlib.sha256()
    for parameter in parameters:
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        seen.update(whole.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def past_the_wrapper(patch: pytest.MonkeyPatch) -> None:
    """Call the policy itself in training, so that DDP does not know of it."""
    from fused_dpo_engine.distributed.ddp import Replicated

    wrap = Replicated.__init__

    def bare(self: Replicated, module: Any, ranks: Any) -> None:
        wrap(self, module, ranks)
        self.module = module

    patch.setattr(Replicated, "__init__", bare)
    patch.setattr(Replicated, "micro_batch", lambda *_, **__: nullcontext())


def local_mean(patch: pytest.MonkeyPatch) -> None:
    """Take the mean over a rank's own pairs, of which there is one pass."""
    from fused_dpo_engine.training.trainer import Trainer

    loss_of = Trainer._loss_of

    def of_own(self: Trainer, batch: Any, scores: Any, reference: Any, _: int, chosen_tokens: int) -> Any:
        return loss_of(self, batch, scores, reference, batch.num_pairs * self.ranks.data_size, chosen_tokens)

    patch.setattr(Trainer, "_loss_of", of_own)


def traced_alone(patch: pytest.MonkeyPatch) -> None:
    """Compile with the backend that runs the traced graphs as they are."""
    from fused_dpo_engine.model.policy import Policy

    compile_backbone = Policy.compile_backbone
    patch.setattr(Policy, "compile_backbone", lambda self, **more: compile_backbone(self, "aot_eager", **more))


def no_room(patch: pytest.MonkeyPatch) -> None:
    """Let gradients that add up whole not fit."""
    from fused_dpo_engine.commands import train

    patch.setattr(train, "fits", lambda *_, **how: how.get("reduces_every_pass", True))


def asked_to_stop(patch: pytest.MonkeyPatch) -> None:
    """Ask one rank in step 3 to stop, as a scheduler may."""
    from fused_dpo_engine.distributed.failures import interrupts
    from fused_dpo_engine.training.trainer import Trainer

    step = Trainer._step

    def asked(self: Trainer, number: int, *arguments: Any) -> Any:
        interrupts.wanted = interrupts.wanted or (number == 3 and self.ranks.rank == self.ranks.size - 1)
        return step(self, number, *arguments)

    patch.setattr(Trainer, "_step", asked)


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "outside": past_the_wrapper,
    "local mean": local_mean,
    "traced": traced_alone,
    "no room": no_room,
    "asked to stop": asked_to_stop,
}
"""Two mistakes that the tests must be able to see, a compiler that takes less time, a small device, and an end."""


def main() -> None:
    """Run every case of the file, and write what came of each beside it."""
    from fused_dpo_engine.cli import parse
    from fused_dpo_engine.commands import train as command
    from fused_dpo_engine.training.trainer import Trainer

    made: list[Trainer] = []
    build = Trainer.__init__

    def kept(self: Trainer, *arguments: Any) -> None:
        build(self, *arguments)
        made.append(self)

    setattr(Trainer, "__init__", kept)  # noqa: B010, as type checkers mind
    file, digests = Path(sys.argv[1]), {}
    dist.init_process_group("gloo")
    for name, case in json.loads(file.read_text(encoding="utf-8")).items():
        with pytest.MonkeyPatch.context() as patch:
            if case["change"]:
                CHANGES[case["change"]](patch)
            with suppress(KeyboardInterrupt):
                command.train(parse("train", case["options"]))
        digests[name] = [""] * dist.get_world_size()
        dist.all_gather_object(digests[name], digest(made.pop().policy.parameters()))
    if dist.get_rank() == 0:
        file.with_suffix(".out").write_text(json.dumps(digests), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
