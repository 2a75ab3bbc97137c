"""Where a run begins or goes on, and whether what goes on is the same run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fused_dpo_engine.checkpoint.folder import CHECKSUMS, FOLDER, Checkpoint, Checkpoints, open_checkpoint
from fused_dpo_engine.config.changes import changed
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import RunOptions
from fused_dpo_engine.data.pairs import TokenPair, digest_pairs
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.fingerprint import fingerprint
from fused_dpo_engine.training.run_folder import CONFIG, SUMMARY, check_output
from fused_dpo_engine.training.summary import Summary

Say = Callable[[str], Any]


def find_checkpoint(run: RunOptions, output: Path, ranks: Ranks, say: Say) -> Checkpoint | None:
    """Find the checkpoint that `--resume` means, None to begin anew, and find out whether the folder can be written.

    Args:
        run: how the run begins.
        output: its folder.
        ranks: the processes, all of which call this.
        say: prints a line.

    Raises:
        UserError: the folder cannot be written, or holds another run; there is no checkpoint at the path; or it is
            damaged.
    """
    if run.resume == "never":
        _on_main(ranks, lambda: check_output(output, replaced=run.overwrite))
        return None
    if run.resume == "auto":
        there = _on_main(ranks, lambda: check_output(output, replaced=True))
        checkpoint = _newest(output, ranks, say)
        if there and checkpoint is None and _ended(output) is None:
            say(f"no checkpoint in {output} is whole: the run begins anew")
        return checkpoint
    folder = Path(run.resume)
    is_one = (folder / CHECKSUMS).is_file()
    checkpoint = open_checkpoint(folder, ranks) if is_one else _newest(folder, ranks, say)
    if checkpoint is None:
        raise UserError(
            f"--resume {folder}: no checkpoint, and no run with one that is whole; give auto, a run's folder, or one "
            f"of its {FOLDER}/step-..."
        )
    of_this_run = checkpoint.folder.resolve().parent.parent == output.resolve()
    _on_main(ranks, lambda: check_output(output, replaced=run.overwrite or of_this_run))
    return checkpoint


def finished(config: TrainConfig, output: Path, ranks: Ranks) -> Summary | None:
    """Read the summary of a run that has come to its end in a folder, if `--resume auto` is to go on with it.

    Raises:
        UserError: that run had other settings.
    """
    return _on_main(ranks, lambda: _finished(config, output)) if config.run.resume == "auto" else None


def identify(
    config: TrainConfig, pairs: list[TokenPair], held_out: list[TokenPair], ranks: Ranks
) -> dict[str, str | None]:
    """Digest what a run trains on and starts from, by what it is called in a message; the same on all ranks."""
    identity: dict[str, str | None] = {"the pairs of --data": digest_pairs(pairs)}
    identity["the held-out pairs"] = digest_pairs(held_out)
    trust = config.model.trust_remote_code

    def digests() -> list[str | None]:
        names = (config.model.model, config.model.ref_model)
        return [fingerprint(name, trust_remote_code=trust) if name else None for name in names]

    model, reference = _on_main(ranks, digests)
    return {**identity, "the weights of --model": model, "the weights of --ref-model": reference}


def environment(config: TrainConfig) -> dict[str, str]:
    """Tell what decides about the last bits of results beside settings and data."""
    import transformers

    import fused_dpo

    name = torch.cuda.get_device_name() if config.model.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = {"fused-dpo": fused_dpo.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    return {**versions, "device": str(name), "threads": str(torch.get_num_threads())}


def check_same_run(
    checkpoint: Checkpoint, config: TrainConfig, identity: Mapping[str, str | None], ranks: Ranks, say: Say
) -> None:
    """Refuse to go on with other settings, pairs or models, and say what changes results by their rounding.

    Raises:
        UserError: names all that has changed.
    """
    record = checkpoint.record
    refused, rounded = changed(record["settings"], config.flat())
    refused += [f"{name} are others" for name, digest in identity.items() if record["identity"].get(name) != digest]
    if record["processes"] != ranks.size:
        line = f"{record['processes']} processes, now {ranks.size}"
        # Full forward passes are dealt out a rank at a time, so that their steps are others.
        (rounded if config.packing.batches_per_step is None else refused).append(line)
    if refused:
        raise UserError(
            f"checkpoint {checkpoint.folder} belongs to a run that was another one: {'; '.join(refused)}. Put back "
            f"what has changed, or begin anew in another --output."
        )
    now = environment(config)
    rounded += [f"{name} {was}, now {now.get(name)}" for name, was in record["environment"].items() if was != now[name]]
    say(f"going on after step {checkpoint.step} from {checkpoint.folder}")
    if rounded:
        say(f"warning: results will differ in their rounding from those of one run: {'; '.join(rounded)}")


def _finished(config: TrainConfig, output: Path) -> Summary | None:
    ended = _ended(output)
    if ended is None:
        return None
    summary, before = ended
    refused, _ = changed(before, config.flat())
    if refused:
        raise UserError(
            f"{output} holds a run that has come to its end with other settings ({'; '.join(refused)}); choose "
            f"another --output."
        )
    return summary


def _ended(output: Path) -> tuple[Summary, dict[str, Any]] | None:
    """Read summary and settings of a run that has come to its end; None if there is none."""
    try:
        summary = Summary(**json.loads((output / SUMMARY).read_text(encoding="utf-8")))
        settings = json.loads((output / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    return (summary, settings) if summary.finished else None


def _newest(output: Path, ranks: Ranks, say: Say) -> Checkpoint | None:
    checkpoint, damaged = Checkpoints(output, 1, ranks).newest()
    for line in damaged:
        say(f"warning: {line} It is left out.")
    return checkpoint


def _on_main(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Do something on the main rank, and give all ranks its result; if it fails, it fails for all."""
    result: Any = None
    failure: UserError | None = None
    if ranks.is_main:
        try:
            result = work()
        except UserError as error:
            failure = error
    result, failure = ranks.gather_objects((result, failure))[0]
    if failure is not None:
        raise failure
    return result
