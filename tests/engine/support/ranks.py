"""Training runs on several processes: torchrun ... -m tests.engine.support.ranks CASES; one process group for all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.engine.support.toys import ROOT

NOT_LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def launch(ranks: int, *arguments: object, module: str = "tests.engine.support.ranks", **settings: Any) -> Any:
    """Start a module on some processes by torchrun, and wait for it; its output is captured."""
    path = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_LAUNCHED}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


def digest(parameters: Any) -> str:
    """Of all weights, bit for bit; of shards as a whole."""
    seen = hashlib.sha256()
    for parameter in parameters:
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        seen.update(whole.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def main() -> None:
    """Run every case of a JSON file `{name: [options]}`, and write what came of each on all ranks beside it."""
    from fused_dpo_engine.cli import parse
    from fused_dpo_engine.commands import train as command
    from fused_dpo_engine.training.trainer import Trainer

    trainers: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            trainers.append(self)

    command.Trainer = Kept  # pyright: ignore[reportPrivateImportUsage]
    cases = Path(sys.argv[1])
    outcomes: dict[str, Any] = {}
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    for name, options in json.loads(cases.read_text(encoding="utf-8")).items():
        trainers.clear()
        outcome: dict[str, Any] = {}
        try:
            command.train(parse("train", options))
        except Exception as error:
            import traceback
            outcome["error"] = f"{type(error).__name__}: {error}"
            outcome["tb"] = traceback.format_exc()
        if trainers:
            outcome["digest"] = digest(trainers[0].policy.parameters())
        everywhere: list[Any] = [outcome]
        if dist.is_initialized():
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, outcome)
        outcomes[name] = everywhere
    if not dist.is_initialized() or dist.get_rank() == 0:
        cases.with_suffix(".out").write_text(json.dumps(outcomes), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
