"""On macOS and Windows there is no triton, on Windows no `resource`: function and trainer work on the CPU without."""

import json
from pathlib import Path

from tests.engine.helpers import options
from tests.kernels.test_imports import run

HIDE_RESOURCE = "import sys, transformers.modeling_utils\nsys.modules['resource'] = None\n"
"""A module of Unix alone."""
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Hide())
"""
CALL = """
import torch
from fused_dpo import KernelOptions, fused_dpo_logps

weight, labels = torch.randn(300, 16), torch.arange(40)[None]
def gradient(**settings):
    hidden = torch.linspace(-1, 1, 40 * 16).view(1, 40, 16).requires_grad_()
    fused_dpo_logps(hidden, weight, labels, **settings).sum().backward()
    return hidden.grad
"""


def test_control_triton_is_hidden(tmp_path: Path) -> None:
    code = "try:\n    import triton\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert run(HIDE + code, tmp_path).strip() == "No module named 'triton'"


def test_gradients(tmp_path: Path) -> None:
    """Exact and filtered, those of the oracle."""
    code = (
        "oracle = gradient(options=KernelOptions(impl='reference'))\n"
        "for mode in ('exact', 'filtered'):\n"
        "    torch.testing.assert_close(gradient(grad_mode=mode), oracle, rtol=1e-4, atol=1e-5)\n"
        "print('right')"
    )
    assert run(HIDE + CALL + code, tmp_path).strip() == "right"


def test_an_implementation_that_needs_it_says_so(tmp_path: Path) -> None:
    code = (
        "for impl in ('triton', 'library'):\n"
        "    try:\n        gradient(options=KernelOptions(impl=impl))\n"
        "    except ImportError as error:\n        print(error)"
    )
    lines = run(HIDE + CALL + code, tmp_path).splitlines()
    assert [line.split("; ")[1] for line in lines] == ["use None or 'streaming'."] * 2


def test_a_gpu_without_it_streams(tmp_path: Path) -> None:
    code = (
        "from types import SimpleNamespace\nfrom fused_dpo.validation import choose_implementation\n"
        "print(choose_implementation(None, SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)))"
    )
    assert run(HIDE + CALL + code, tmp_path).strip() == "streaming"


def test_a_run(toy_settings, tmp_path: Path) -> None:
    arguments = options(**{**toy_settings, "output": tmp_path / "run"})
    code = f"from fused_dpo_engine.cli import main\nmain({['train', *arguments]!r})\nprint('triton' in sys.modules)"
    assert run(HIDE + code, tmp_path).strip() == "False"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == toy_settings["max_steps"]


def test_peak_memory_on_windows(tmp_path: Path) -> None:
    """Ours is imported without `resource`, which others ask for where they find Unix, and memory is asked of psutil."""
    code = (
        "import torch\nfrom types import SimpleNamespace\n"
        "from fused_dpo_engine import metrics\n"
        "process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))\n"
        "sys.modules['psutil'] = SimpleNamespace(Process=lambda: process)\n"
        "metrics.sys = SimpleNamespace(platform='win32')\n"
        "print(metrics.peak_memory_gib(torch.device('cpu')))"
    )
    assert run(HIDE_RESOURCE + code, tmp_path).strip() == "3.0"
