"""Run the tests of kernels and trainer with the newest and with the oldest packages that pyproject.toml allows.

Other trainers pin older releases of transformers than our trainer takes: what is put into them has to work there.

    make versions                                    both, and `drop_in`
    nox --session oldest -- tests/engine -k packed   one of them, and what pytest is to run there

Each has an environment of its own below .nox/, of some gigabytes, as torch comes as its CUDA build, which runs on a CPU
too. They are kept, and brought up to date by the next run; `nox --reuse-venv no` makes them anew.
"""

import nox

nox.options.reuse_venv = "yes"
TESTS = (
    *("tests/kernels", "tests/engine"),
    *(f"tests/benchmarks/test_{name}.py" for name in ("compile_table", "gpu_checks", "step")),
)
DROP_IN = (
    *("tests/kernels/integrations", "tests/test_trainer_examples.py"),
    *(f"tests/kernels/models/test_{name}.py" for name in ("check_head", "head", "head_layers", "wrapped_heads")),
    *("tests/engine/attention/test_plain_calls.py", "tests/engine/batching"),
)


def run_tests(session: nox.Session, *choice: str) -> None:
    """Install the project with what `choice` tells pip, and run its tests."""
    session.install(*choice)
    session.run("python", "-m", "pytest", "-n", "auto", *(session.posargs or TESTS))


@nox.session
def newest(session: nox.Session) -> None:
    """Run the tests with the newest release of every package, those that others ask for included."""
    run_tests(session, "--upgrade", "--upgrade-strategy", "eager", "--editable", ".[dev,trl]")


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests with the lower bounds of pyproject.toml; some have no wheels for Python 3.12 and later."""
    run_tests(session, "--constraint", "constraints-oldest.txt", "--editable", ".[dev]")  # TRL wants newer ones


@nox.session
def drop_in(session: nox.Session) -> None:
    """Run the tests of what goes into other trainers with the oldest transformers that one of them pins."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev,trl]")
    session.install("--no-deps", "transformers==5.6.0", "tokenizers==0.22.2")  # LLaMA-Factory 0.9.5
    session.run("python", "-m", "pytest", "-n", "auto", *(session.posargs or DROP_IN))
