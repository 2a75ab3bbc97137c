"""The command `fused-dpo`."""

import difflib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple


class Command(NamedTuple):
    """What `fused-dpo NAME` is; its function has that name in `fused_dpo_engine.commands.NAME`."""

    summary: str
    """A line of the usage."""
    config: str | None = None
    """The class of its settings in `fused_dpo_engine.config.commands`; None for a command without options."""
    description: str = ""
    """The first paragraph of its --help."""


COMMANDS = {
    "train": Command(
        "train a model on preference pairs; `fused-dpo train --help` explains every option",
        "TrainConfig",
        "Train a language model on preference pairs by Direct Preference Optimization.",
    ),
    "reference": Command(
        "score a data set by the reference model, before any training; fills a file that `train` takes",
        "ReferenceConfig",
        "Score preference pairs by the reference model of a run, and keep the log-probs in a reference store.",
    ),
    "plan": Command(
        "print what the forward passes over a data set take, before any training",
        "PlanConfig",
        "Plan the forward passes over preference pairs, and print what they take, without loading a model.",
    ),
    "estimate": Command(
        "print what memory training a model takes, from its configuration alone",
        "EstimateConfig",
        "Estimate what memory training a model takes on each GPU, what fits, and what to change.",
    ),
    "env": Command("print versions, devices and what the kernels can use here"),
}
USAGE = "usage: fused-dpo COMMAND [options]\n\ncommands:\n" + "".join(
    f"  {name:<9}  {command.summary}\n" for name, command in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 diverged or not saved, 2 wrong input, 130 interrupted."""
    try:
        with _sigterm_as_interrupt():
            return _run(arguments)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"fused-dpo: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let what schedulers and containers stop a run with save its model, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"fused-dpo: unknown command {name!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    if COMMANDS[name].config is None and rest:
        if rest in (["-h"], ["--help"]):
            print(USAGE)
            return 0
        print(f"fused-dpo: {name} takes no options, got {' '.join(rest)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        from fused_dpo_engine.errors import OtherRankFailedError, SaveError, TrainingDivergedError, UserError

        work = getattr(importlib.import_module(f"fused_dpo_engine.commands.{name}"), name)
        importlib.import_module("fused_dpo_engine.config.commands")
    except ModuleNotFoundError as error:
        print(f"fused-dpo: {error}. The trainer needs: pip install 'fused-dpo[train]'", file=sys.stderr)
        return 2
    try:
        settings = [] if COMMANDS[name].config is None else [_parse_once(name, rest)]
        with _told_to_torchrun():
            work(*settings)
    except OtherRankFailedError:
        return 1
    except UserError as error:
        print(f"fused-dpo: {error}", file=sys.stderr)
        return 2
    except (TrainingDivergedError, SaveError) as error:
        print(f"fused-dpo: {error}", file=sys.stderr)
        return 1
    return 0


def _parse_once(name: str, arguments: Sequence[str]) -> Any:
    """Read the options; of the processes of a machine, which all get the same, one alone says what is wrong."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return parse(name, arguments)
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        try:
            return parse(name, arguments)
        except ValueError as error:  # UserError
            raise SystemExit(2) from error


def _told_to_torchrun() -> AbstractContextManager[None]:
    """Let torchrun, if it has started this process, report the error that ends the block."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return nullcontext()
    from fused_dpo_engine.distributed.failures import told_to_torchrun

    return told_to_torchrun()


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Read the options of a command into its configuration.

    Options of a `--config` file come first, so that others win; those of the file that the command lacks are left out.

    Args:
        name: a key of COMMANDS, of a command that has options.
        arguments: what follows the name.

    Raises:
        UserError: a config file that is missing, is no mapping or names unknown options, or settings that contradict
            each other.
        SystemExit: unknown or malformed options, after a message (status 2), and --help (status 0).
    """
    import tyro

    from fused_dpo_engine.config import commands
    from fused_dpo_engine.config.files import OLDER, arguments_of_file
    from fused_dpo_engine.config.paths import refuse_overlap

    command = COMMANDS[name]
    config = getattr(commands, str(command.config))
    rest: list[str] = []
    from_files: list[str] = []
    files: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or next(remaining, "")
            from_files += arguments_of_file(path, config)
            files.append(path)
        else:
            rest += OLDER.get(argument, (argument,))
    parsed: Any = tyro.cli(
        config,
        prog=f"fused-dpo {name}",
        description=(
            f"{command.description}\n\n"
            "--config FILE.yaml reads options from a YAML or JSON file of `name: value` lines, such as the config.json "
            "of an earlier run; options given on the command line win."
        ),
        args=from_files + rest,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if name == "train":
        for path in files:
            refuse_overlap(parsed.run.output, {"--config": path})
    return parsed


if __name__ == "__main__":
    sys.exit(main())
