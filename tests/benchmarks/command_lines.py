"""What the tests of the benchmarks' command lines share."""

from collections.abc import Callable, Sequence

import pytest


def refusal(main: Callable[[Sequence[str]], int], arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what a command says that refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
