"""`--report-to`: what trackers are given, and that none of them costs a run."""

import json
import sys
import types
import warnings
from typing import Any

import pytest

from fused_dpo_engine.errors import UserError
from fused_dpo_engine.training.trackers import Trackers, check_trackers
from tests.engine.support.runs import training_forward


class FakePackage(types.ModuleType):
    """A package with the interface of wandb and trackio that writes down what it is told."""

    def __init__(self, name: str, fails_at: str = ""):
        super().__init__(name)
        self.fails_at, self.started, self.logged, self.finished = fails_at, {}, [], 0

    def _may_fail(self, where: str) -> None:
        if where == self.fails_at:
            raise ConnectionError(f"no network\nat {where}")
        if f"{where} interrupted" == self.fails_at:
            raise KeyboardInterrupt

    def init(self, **settings: Any) -> "FakePackage":
        self._may_fail("init")
        self.started = settings
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1
        self._may_fail("finish")


@pytest.fixture
def package(monkeypatch):
    """Put a fake in the place of a package."""
    for name in ("PROJECT", "NAME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
        monkeypatch.delenv(f"TRACKIO_{name}", raising=False)

    def put(name: str, fails_at: str = "") -> FakePackage:
        fake = FakePackage(name, fails_at)
        fake.__spec__ = types.SimpleNamespace(origin="somewhere")  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    return put


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run(package, train_tiny, name):
    """Under TensorBoard's names, with the settings, in the project and under the name that the docs say."""
    fake = package(name)
    run = train_tiny("my-run", report_to=name, eval_fraction=0.25)
    assert not (run.output / "tensorboard").exists()
    flat = json.loads((run.output / "config.json").read_text(encoding="utf-8"))
    assert fake.started == {"project": "fused-dpo", "name": "my-run", "config": flat}
    assert flat["report_to"] == [name]
    assert [step for step, _ in fake.logged] == [0, 1, 2, 3]
    assert set(fake.logged[0][1]) == {
        f"eval/{key.removeprefix('eval_')}" if "/" not in key else key for key in run.summary.eval_before
    }
    for (step, logged), line in zip(fake.logged[1:], run.metrics, strict=True):
        assert (step, logged["train/loss"], logged["rewards/margins"]) == (
            line["step"],
            line["loss"],
            line["rewards/margins"],
        )
        assert len(logged) == len(line) - 1
    assert fake.finished == 1


def test_environment_variables(package, train_tiny, monkeypatch):
    fake = package("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "another")
    train_tiny(report_to="wandb", max_steps=1)
    assert (fake.started["project"], fake.started["name"]) == ("theirs", "another")


def test_several_at_once(package, train_tiny):
    fakes = [package("wandb"), package("trackio")]
    run = train_tiny(report_to=["trackio", "tensorboard", "wandb"], max_steps=2)
    assert list((run.output / "tensorboard").glob("events*"))
    assert [[step for step, _ in fake.logged] for fake in fakes] == [[1, 2]] * 2


def test_none_writes_no_event_files(train_tiny, package):
    fake = package("wandb")
    run = train_tiny(report_to="none", max_steps=1)
    assert not list(run.output.rglob("*tfevents*"))
    assert not fake.started


def test_tensorboard_shows_the_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, {"beta": 0.25})
    trackers.log({"train/loss": 0.5}, 3)
    trackers.finish()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"]
    (text,) = board.Tensors("settings/text_summary")
    assert b'"beta": 0.25' in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(package, train_tiny, where):
    """One warning, and the others go on."""
    broken, whole = package("wandb", fails_at=where), package("trackio")
    with pytest.warns(UserWarning, match=r"--report-to wandb failed \(ConnectionError: no network\.\)") as caught:
        run = train_tiny(report_to=["wandb", "trackio"])
    assert len([warning for warning in caught if "--report-to" in str(warning.message)]) == 1
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert run.summary.saved["model"] == "after step 3"
    assert [step for step, _ in whole.logged] == [1, 2, 3]
    assert (broken.finished, whole.finished) == (int(where != "init"), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_trackers_are_finished_however_the_run_ends(package, train_tiny, monkeypatch, error):
    fakes = [package("wandb"), package("trackio")]

    def stop(_, __, logps):
        if fakes[0].logged:
            raise error
        return logps

    training_forward(monkeypatch, stop)
    with pytest.raises(error):
        train_tiny(report_to=["wandb", "trackio"])
    assert [len(fake.logged) for fake in fakes] == [1, 1]
    assert [fake.finished for fake in fakes] == [1, 1]


@pytest.mark.parametrize("where", ["init", "finish"])
def test_an_interruption_of_one_tracker_finishes_the_other(package, train_tiny, tmp_path, where):
    """Ctrl-C while one asks for a login, or waits for its network; the summary says what happened."""
    other = package("wandb")
    package("trackio", fails_at=f"{where} interrupted")
    with pytest.raises(KeyboardInterrupt):
        train_tiny(report_to=["wandb", "trackio"])
    assert other.finished == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["stopped"] == ("interrupted" if where == "init" else "all steps done")


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "train")])
def test_a_missing_package_is_refused_before_anything_is_loaded(train_tiny, monkeypatch, tmp_path, name, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("fused_dpo_engine.commands.train.load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=rf"--report-to {name} needs .* pip install 'fused-dpo\[{extra}\]'"):
        train_tiny(report_to=name)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_is_no_package(monkeypatch, tmp_path):
    """wandb leaves a folder `wandb` where a run was started, and Python takes any folder for a package."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="needs the package a_tracker"):
        check_trackers(["a_tracker"])
    (tmp_path / "a_tracker" / "__init__.py").touch()
    check_trackers(["a_tracker", "none"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none", "wandb"], "report-to none goes with no other tracker, got none wandb"),
        (["wandb", "wandb"], "each tracker once, or none, got wandb wandb"),
        ([], "each tracker once, or none, got nothing"),
    ],
)
def test_names_that_contradict_each_other(train, names, message):
    done = train(report_to=names)
    assert done.status == 2
    assert message in done.message


class TestRealPackages:
    def test_wandb(self, train_tiny, monkeypatch, tmp_path):
        pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        self.run_without_warnings(train_tiny, "wandb")
        assert len(list(tmp_path.rglob("*.wandb"))) == 1

    def test_trackio(self, train_tiny, monkeypatch, tmp_path):
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read on import
        pytest.importorskip("trackio", reason="trackio is not installed (extra `trackio`)")
        self.run_without_warnings(train_tiny, "trackio")
        assert [path.name for path in tmp_path.glob("*.db")] == ["fused-dpo.db"]

    def run_without_warnings(self, train_tiny, name: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="--report-to")
            train_tiny(report_to=name, max_steps=2)
