"""On macOS and Windows there is no triton, on Windows no `resource`: function and trainer work on the CPU without."""

import json
from pathlib import Path

import pytest

from tests.engine.support.toys import options
from tests.fresh_process import hide, run

CALL = """
import torch
from fused_dpo import KernelOptions, fused_token_logps

torch.manual_seed(0)
weight, labels = 4 * torch.randn(2000, 16), torch.randint(2000, (1, 200))
def call(**settings):
    hidden = torch.randn(1, 200, 16, requires_grad=True)
    result = fused_token_logps(hidden, weight, labels, with_stats=("kept_fraction",), **settings)
    result.logps.sum().backward()
    return result, hidden.grad
"""


@pytest.mark.parametrize("mode", ["exact", "filtered"])
def test_the_same_bits_as_with_it(mode: str, tmp_path: Path) -> None:
    """Of logits that the filter drops something of."""
    code = CALL + (
        f"result, gradient = call(grad_mode={mode!r})\n"
        f"assert bool(result.kept_fraction[0, :-1].max() < 1) is ({mode!r} == 'filtered')\n"
        "print([x.hex() for x in torch.cat((result.logps.flatten(), gradient.flatten())).tolist()])"
    )
    without, with_it = run(hide("triton") + code, tmp_path), run(code, tmp_path)
    assert without == with_it
    assert "nan" not in without


def test_an_implementation_that_needs_it_says_so(tmp_path: Path) -> None:
    code = (
        "for impl in ('triton', 'library'):\n"
        "    try:\n        call(options=KernelOptions(impl=impl))\n"
        "    except ImportError as error:\n        print(error)"
    )
    lines = run(hide("triton") + CALL + code, tmp_path).splitlines()
    assert [line.split("; ")[1] for line in lines] == ["use None or 'streaming'."] * 2


def test_a_gpu_without_it_streams(tmp_path: Path) -> None:
    code = (
        "from types import SimpleNamespace\nfrom fused_dpo.validation import choose_implementation\n"
        "print(choose_implementation(None, SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)))"
    )
    assert run(hide("triton") + CALL + code, tmp_path).strip() == "streaming"


def test_a_run(toy_settings, tmp_path: Path) -> None:
    arguments = options(**{**toy_settings, "output": tmp_path / "run"})
    code = f"from fused_dpo_engine.cli import main\nprint(main({['train', *arguments]!r}), sys.modules['triton'])"
    assert run(hide("triton") + code, tmp_path).split() == ["0", "None"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == toy_settings["max_steps"]


def test_peak_memory_on_windows(tmp_path: Path) -> None:
    """Ours is imported without `resource`, which others ask for where they find Unix, and memory is asked of psutil."""
    code = (
        "import torch\nfrom types import SimpleNamespace\n"
        "from fused_dpo_engine.training import metrics\n"
        "process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))\n"
        "sys.modules['psutil'] = SimpleNamespace(Process=lambda: process)\n"
        "metrics.sys = SimpleNamespace(platform='win32')\n"
        "print(metrics.peak_memory_gib(torch.device('cpu')))"
    )
    others = "import transformers.modeling_utils\n"
    assert run(others + hide("resource") + code, tmp_path).strip() == "3.0"
