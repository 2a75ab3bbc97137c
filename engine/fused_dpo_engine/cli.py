"""The command `fused-dpo`."""

import difflib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

USAGE = """usage: fused-dpo COMMAND [options]

commands:
  train    train a model on preference pairs; `fused-dpo train --help` explains every option
  plan     print what the forward passes over a data set take, before any training
  env      print versions, devices and what the kernels can use here
"""
COMMANDS = ("train", "plan", "env")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 training diverged, 2 wrong input, 130 interrupted."""
    try:
        with _sigterm_as_interrupt():
            return _run(arguments)
    except KeyboardInterrupt:
        print("fused-dpo: interrupted", file=sys.stderr)
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
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help") or (command == "env" and rest in (["-h"], ["--help"])):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"fused-dpo: unknown command {command!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    if command == "env" and rest:
        print(f"fused-dpo: env takes no options, got {' '.join(rest)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        from fused_dpo_engine.errors import TrainingDivergedError, UserError

        if command == "env":
            from fused_dpo_engine.commands.env import describe

            print(describe())
            return 0
        if command == "plan":
            from fused_dpo_engine.commands.plan import plan as work

            parse = parse_plan
        else:
            from fused_dpo_engine.commands.train import train as work

            parse = parse_train
    except ModuleNotFoundError as error:
        print(f"fused-dpo: {error}. The trainer needs: pip install 'fused-dpo[train]'", file=sys.stderr)
        return 2
    try:
        work(parse(rest))
    except UserError as error:
        print(f"fused-dpo: {error}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"fused-dpo: {error}", file=sys.stderr)
        return 1
    return 0


def parse_train(arguments: Sequence[str]) -> Any:
    """Options of `fused-dpo train` as a `TrainConfig`; those of a `--config` file come first, so others win.

    Raises:
        UserError: a config file that is missing, is no mapping or names unknown options, or settings that contradict
            each other.
        SystemExit: unknown or malformed options, after a message (status 2), and --help (status 0).
    """
    from fused_dpo_engine.config.commands import TrainConfig

    return _parse(
        TrainConfig,
        "fused-dpo train",
        "Train a language model on preference pairs by Direct Preference Optimization.",
        arguments,
    )


def parse_plan(arguments: Sequence[str]) -> Any:
    """Options of `fused-dpo plan` as a `PlanConfig`; of a `--config` file those that it knows.

    Raises:
        UserError, SystemExit: as in `parse_train`.
    """
    from fused_dpo_engine.config.commands import PlanConfig

    return _parse(
        PlanConfig,
        "fused-dpo plan",
        "Plan the forward passes over preference pairs, and print what they take, without loading a model.",
        arguments,
    )


def _parse(config: type, program: str, description: str, arguments: Sequence[str]) -> Any:
    import tyro

    from fused_dpo_engine.config.files import arguments_of_file

    rest: list[str] = []
    from_files: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or next(remaining, "")
            from_files += arguments_of_file(path, config)
        else:
            rest.append(argument)
    return tyro.cli(
        config,
        prog=program,
        description=(
            f"{description}\n\n"
            "--config FILE.yaml reads options from a YAML or JSON file of `name: value` lines, such as the config.json "
            "of an earlier run; options given on the command line win."
        ),
        args=from_files + rest,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    sys.exit(main())
