"""Where a run may write: never into what it reads, never over it."""

from collections.abc import Mapping
from pathlib import Path

from fused_dpo_engine.errors import UserError


def refuse_overlap(output: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse an output folder that is, contains or lies in something that the run reads, symbolic links followed.

    A run replaces files in its folder. With `--overwrite` it removes what an earlier run wrote there, which may be the
    very model it is to start from.

    Args:
        output: what `--output` says.
        inputs: path or name by option; None, and names that are no path here, are left out.

    Raises:
        UserError: they overlap.
    """
    target = Path(output).expanduser().resolve()
    for option, value in inputs.items():
        if not value or not Path(value).expanduser().exists():  # a name on the Hub, or what loading will refuse
            continue
        path = Path(value).expanduser().resolve()
        if path == target:
            relation = "is"
        elif target in path.parents:
            relation = "contains"
        elif path in target.parents:
            relation = "lies in"
        else:
            continue
        raise UserError(
            f"--output {output} {relation} what {option} names, {value}; a run replaces files in its folder, so give "
            f"it one that is apart from all that it reads."
        )
