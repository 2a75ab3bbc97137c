"""Tensors come back as they were, and a checkpoint of somebody else runs no code."""

import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from fused_dpo_engine.checkpoint.tensors import INDEX, load_tensors, save_tensors, shapes_in
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError

ONE = Ranks()
TENSORS = {
    "matrix": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([1.0, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 2),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "integers": torch.tensor([2**62, -1]),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_bits_come_back(tmp_path):
    save_tensors(tmp_path / "a", TENSORS, ONE)
    read = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(tmp_path / "a", read, ONE)
    assert {name: bits(tensor) for name, tensor in read.items()} == {n: bits(t) for n, t in TENSORS.items()}
    assert shapes_in(tmp_path / "a") == {name: tensor.shape for name, tensor in TENSORS.items()}


def test_some_of_them(tmp_path):
    save_tensors(tmp_path, TENSORS, ONE)
    scalar = torch.zeros((), dtype=torch.float64)
    load_tensors(tmp_path, {"scalar": scalar}, ONE)
    assert scalar == 2.5


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"other": torch.zeros(2)}, r"other, here of shape \[2\], is not there"),
        ({"matrix": torch.zeros(4, 3)}, r"matrix, here of shape \[4, 3\], has the shape \[3, 4\]"),
    ],
    ids=["name", "shape"],
)
def test_what_does_not_fit_is_refused(tmp_path, wanted, message):
    save_tensors(tmp_path, TENSORS, ONE)
    with pytest.raises(UserError, match=message):
        load_tensors(tmp_path, wanted, ONE)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


def test_an_index_that_would_run_code_is_refused(tmp_path):
    save_tensors(tmp_path / "a", TENSORS, ONE)
    proof = tmp_path / "proof"
    harmful = pickle.dumps(Harmful(proof))
    (tmp_path / "a" / INDEX).write_bytes(harmful)
    with pytest.raises(UserError, match="does not describe a tensor"):
        shapes_in(tmp_path / "a")
    assert not proof.exists()
    pickle.loads(harmful)
    assert proof.exists(), "control: it would have"


class ByAttribute(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def rewrite_index(folder: Path) -> None:
    """Pickle an index once more, as another Python would."""
    index = pickle.loads((folder / INDEX).read_bytes())
    with (folder / INDEX).open("wb") as file:
        ByAttribute(file).dump(index)


def test_an_index_of_another_python(tmp_path):
    save_tensors(tmp_path, TENSORS, ONE)
    rewrite_index(tmp_path)
    assert b"getattr" in (tmp_path / INDEX).read_bytes()
    read = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(tmp_path, read, ONE)
    assert {name: bits(tensor) for name, tensor in read.items()} == {n: bits(t) for n, t in TENSORS.items()}


class Attribute:
    """Is unpickled to an attribute of a class that describes tensors, from which others can be reached."""

    def __reduce__(self) -> Any:
        return (getattr, (torch.Size, "__class__"))


def test_attributes_of_what_is_no_enumeration_are_refused(tmp_path):
    save_tensors(tmp_path, TENSORS, ONE)
    (tmp_path / INDEX).write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(UserError, match=r"an attribute of .* does not describe a tensor"):
        shapes_in(tmp_path)


def test_bytes_among_the_tensors_are_refused(tmp_path):
    """As those would be unpickled too."""
    save({"tensor": torch.zeros(2), "object": {1, 2}}, checkpoint_id=str(tmp_path), no_dist=True)
    with pytest.raises(UserError, match=r"cannot be read|something else than tensors"):
        shapes_in(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x05.", b"not a pickle", pickle.dumps({"a": 1})], ids=repr)
def test_a_damaged_index_is_a_message(tmp_path, content):
    save_tensors(tmp_path, TENSORS, ONE)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        shapes_in(tmp_path)
