"""Tensors of all ranks in files that can be read by any other number of ranks.

The format is that of torch.distributed.checkpoint. It describes its files by a pickle, of which nothing is read here
but what describes tensors, so that somebody else's checkpoint cannot run code.
"""

import pickle
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import SaveError, UserError, first_line

INDEX = ".metadata"


def save_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write tensors into a folder and wait until they are on the disk; all ranks have to call it.

    Args:
        folder: that all ranks see.
        tensors: by name. Of a DTensor each rank writes its part; of other tensors of one name, which are the same on
            all ranks, one does.
        ranks: the processes.

    Raises:
        SaveError: the system refuses, on whichever rank.
    """
    writer = FileSystemWriter(folder, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what is asked for
            save(tensors, storage_writer=writer, **_group(ranks))
    except CheckpointException as error:  # of one rank or more; the same on all
        raise SaveError(folder, _of_system(next(iter(error.failures.values()))[0])) from error
    except (OSError, RuntimeError) as error:
        raise SaveError(folder, _of_system(error)) from error


def load_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read tensors of a folder into those given, each rank its part of a DTensor; all ranks have to call it.

    Raises:
        UserError: a tensor is not there, or has another shape, or the files cannot be read.
    """
    shapes = shapes_in(folder)
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            there = "is not there" if name not in shapes else f"has the shape {list(shapes[name])}"
            raise UserError(f"{folder}: {name}, here of shape {list(tensor.shape)}, {there}.")
    state: dict[str, Any] = dict(tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=_Reader(folder), **_group(ranks))
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Read the names and shapes of the tensors in a folder.

    Raises:
        UserError: its index is missing, damaged, or holds anything else.
    """
    described = _Reader(folder).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in described.items() if isinstance(entry, TensorStorageMetadata)}


def _of_system(error: BaseException) -> BaseException:
    """Find what the system has said behind what torch says of it."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error


def _group(ranks: Ranks) -> dict[str, Any]:
    return {"no_dist": True} if ranks.size == 1 else {"process_group": ranks.host}


class _Reader(FileSystemReader):
    """Reads the index without running what it may say."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            entries = metadata.state_dict_metadata.values()
        except Exception as error:  # whatever a damaged pickle brings about
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise UserError(f"{path} holds something else than tensors.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Makes what describes tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIBING.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")


def _member(kind: Any, name: str) -> Enum:
    """Find a member of an enumeration, which the first releases of Python 3.11 pickle as an attribute of it."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"an attribute of {kind} does not describe a tensor")
    return kind[name]


_PATHS = {"Path", "PosixPath", "WindowsPath"}
_DESCRIBING = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
}
