"""Patches: what they put where, that they leave nothing behind, and which versions they refuse."""

import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fused_dpo.integrations import Patch, patch_llama_factory, patch_ms_swift, patch_openrlhf, patching
from fused_dpo.integrations.patching import KNOWN, check_version
from fused_dpo.integrations.scoring import Counts
from fused_dpo.integrations.trl_legacy import patch_legacy
from tests.kernels.support.tiny_pairs import tiny
from tests.kernels.support.trainers import PEERS, as_dict


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let patches find this version of their package, or none."""

    def find(package: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    packages = SimpleNamespace(version=find, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(patching, "metadata", packages)


class Base:
    def inherited(self) -> str:
        return "own"


class Owner(Base):
    def method(self) -> str:
        return "own"

    @staticmethod
    def static() -> str:
        return "own"


def new(*_: Any) -> str:
    return "new"


REPLACEMENTS = [(Owner, "method", new), (Owner, "static", staticmethod(new)), (Owner, "inherited", new)]


class TestPatch:
    def test_puts_the_very_objects_back(self) -> None:
        before, built = dict(vars(Owner)), Owner()
        with Patch("toy", REPLACEMENTS, Counts()) as patch:
            assert isinstance(patch, Patch)
            assert [built.method(), Owner.static(), built.inherited(), Base().inherited()] == ["new"] * 3 + ["own"]
        assert dict(vars(Owner)) == before
        patch.undo()
        assert dict(vars(Owner)) == before

    def test_after_an_error_too(self) -> None:
        before = dict(vars(Owner))
        with pytest.raises(KeyError), Patch("toy", REPLACEMENTS, Counts()):
            raise KeyError
        assert dict(vars(Owner)) == before

    def test_one_at_a_time(self) -> None:
        before = dict(vars(Owner))
        patch = Patch("toy", REPLACEMENTS, Counts())
        with pytest.raises(RuntimeError, match=r"toy is patched already; undo\(\) that patch"):
            Patch("toy", REPLACEMENTS, Counts())
        patch.undo()
        with Patch("toy", REPLACEMENTS, Counts()):
            patch.undo()  # of one that is over: leaves the next alone
            assert Owner().method() == "new"
        assert dict(vars(Owner)) == before

    def test_an_attribute_that_is_not_there(self) -> None:
        before = dict(vars(Owner))
        with pytest.raises(AttributeError, match="has no other, so the patch of toy would do nothing"):
            Patch("toy", [*REPLACEMENTS, (Owner, "other", new)], Counts())
        assert dict(vars(Owner)) == before

    def test_replaced_by_somebody_else_since(self) -> None:
        own = vars(Owner)["method"]
        patch = Patch("toy", [(Owner, "method", new)], Counts())
        setattr(Owner, "method", own)  # noqa: B010
        with pytest.raises(RuntimeError, match=r"method of .*Owner.* was replaced again after the patch of toy"):
            patch.undo()
        setattr(Owner, "method", new)  # noqa: B010
        patch.undo()
        assert vars(Owner)["method"] is own


@pytest.mark.parametrize(
    ("patch", "good", "bad"),
    [
        ("patch_trl", ["0.20.0", "0.24.0", "0.28.0", "0.28.1.dev0"], ["0.19.1", "0.29.0", "1.14.0"]),
        ("patch_llama_factory", ["0.9.5", "0.9.5.dev0"], ["0.9.4", "0.9.6", "0.10"]),
        ("patch_ms_swift", ["4.6.0", "4.6.3"], ["4.5.9", "4.7.0", "5.0"]),
        ("patch_openrlhf", ["0.11.0", "0.11.2"], ["0.10.9", "0.12.0", "unknown"]),
    ],
)
def test_versions(patch: str, good: list[str], bad: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for version in good:
        install(monkeypatch, version)
        assert check_version(patch) == check_version(patch, version) == version
    for version in bad:
        with pytest.raises(NotImplementedError, match=rf"{patch} knows .*{version} is installed; pip install '"):
            check_version(patch, version)


PATCHES: dict[str, tuple[Callable[..., Patch], str, str]] = {
    "llama_factory": (patch_llama_factory, "llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
    "ms_swift": (patch_ms_swift, "swift.rlhf_trainers.dpo_trainer", "DPOTrainer"),
    "openrlhf": (patch_openrlhf, "openrlhf.trainer.dpo_trainer", "DPOTrainer"),
    "trl-0.28": (lambda **settings: patch_legacy("0.28.0", **settings), "trl.trainer.dpo_trainer", "DPOTrainer"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_trainer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built before the patch follows it, and its own method comes back; the settings reach the kernels."""
    patch, path, class_name = PATCHES[name]
    peer = PEERS[name]

    class Trainer:
        def __init__(self) -> None:
            vars(self).update(vars(peer.trainer()))

        def concatenated_forward(self, *args: Any, **kwargs: Any) -> Any:
            return peer.stand_in(self, *args, **kwargs)

    own = vars(Trainer)["concatenated_forward"]
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    setattr(sys.modules[path], class_name, Trainer)
    install(monkeypatch, None if name == "trl-0.28" else KNOWN[f"patch_{name}"][1])
    built, batch = Trainer(), peer.batch("right")
    expected = built.concatenated_forward(peer.model(tiny()), *batch)
    for packed in (True, False):
        with patch(packed=packed) as active:
            got = built.concatenated_forward(peer.model(tiny()), *batch)
            assert (active.counts.calls, active.counts.packed_calls) == (1, packed)
        sums = [
            next(value for key, value in as_dict(each).items() if key in ("0", "chosen_logps"))
            for each in (got, expected)
        ]
        # Of up to nine fp32 log-probs of a few nats each.
        torch.testing.assert_close(*sums, rtol=2e-6, atol=0)
        assert vars(Trainer)["concatenated_forward"] is own
    with patch(grad_mode="nothing"), pytest.raises(ValueError, match="grad_mode"):
        built.concatenated_forward(peer.model(tiny()), *batch)


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "openrlhf"])
def test_a_trainer_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(ImportError, match=rf"patch_{name} needs .* not installed; pip install"):
        PATCHES[name][0]()
