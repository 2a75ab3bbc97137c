"""Types of command-line arguments: what cannot work is said in one line, before anything is measured."""

import argparse
import math
from pathlib import Path


def out_file(text: str) -> Path:
    """Accept a file to write: its folder is made, and opening it is tried."""
    path = Path(text)
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}; name another file") from None
    return path


def out_folder(text: str) -> Path:
    """Accept a folder to write into, made if it is not there."""
    probe = Path(text) / ".writable"
    try:
        return out_file(str(probe)).parent
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"cannot write into {text}; name another folder") from None


def hidden_file(text: str) -> Path:
    """Accept a file of hidden states and their head, as `benchmarks.heads.replay` reads it."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not there")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise argparse.ArgumentTypeError("reading it needs the package safetensors; install it") from None
    from benchmarks.heads.replay import TENSORS

    try:
        with safe_open(path, "pt") as file:
            missing = TENSORS - set(file.keys())
    except (OSError, SafetensorError) as error:
        raise argparse.ArgumentTypeError(f"{path} is no safetensors file: {error}") from None
    if missing:
        raise argparse.ArgumentTypeError(
            f"{path} holds no {', '.join(sorted(missing))}; see benchmarks/heads/replay.py"
        )
    return path


def positive_int(text: str) -> int:
    """Accept 1, 2, 3, …"""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive(text: str) -> float:
    """Accept a finite number over 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be over 0 and finite, got {text}")
    return value


def fraction(text: str) -> float:
    """Accept a number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value
