"""What the documents say of themselves and of the code: links lead somewhere, names are those that exist."""

import re
from pathlib import Path

import pytest

from fused_dpo.losses import LOSSES
from fused_dpo_engine.attention.choice import ORDER
from fused_dpo_engine.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if "://" not in target and not (document.parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert broken_links(document, text) == []
    assert broken_links(document, text + "[control](nowhere.md#at-all)") == ["nowhere.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_that_are_named_exist(document: Path) -> None:
    """Dotted paths in backticks: a module, or what a module has."""
    for path in set(re.findall(r"`(fused_dpo(?:_engine)?(?:\.\w+)+|benchmarks(?:\.\w+)+)`", document.read_text())):
        parts = path.split(".")
        root = {"fused_dpo": "kernels/", "fused_dpo_engine": "engine/"}.get(parts[0], "")
        places = [ROOT / (root + "/".join(parts[: len(parts) - cut])) for cut in (0, 1)]
        assert any(place.is_dir() or place.with_suffix(".py").is_file() for place in places), path


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


def test_every_loss_is_in_its_table() -> None:
    _, *rows = re.findall(r"^\| `(\w+)` \|(.*)", text_of("docs/losses.md"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(LOSSES)
    for name, rest in rows:
        spec = LOSSES[name]
        assert ("no reference" in rest) is not spec.reference, name
        assert ("across pairs" in rest) is spec.across_pairs, name
        taken = {
            option
            for option in ("label_smoothing", "simpo_gamma", "dpop_lambda", "odpo_alpha")
            if f"`{option}`" in rest
        }
        assert taken == set(spec.options) - {"reward_shift"}, name


def test_every_attention_backend_is_in_its_table() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", text_of("docs/packing.md"), flags=re.MULTILINE)) == ORDER


def test_every_command_is_in_the_readme() -> None:
    text = text_of("README.md")
    assert all(f"fused-dpo {name}" in text for name in COMMANDS)


def test_the_words_of_the_gpu_room_are_explained_once_more() -> None:
    """The glossary of docs/kernels.md has the words of the room's docstring."""
    import fused_dpo.gpu

    words = re.findall(r"^    (\w[\w, ]*): ", str(fused_dpo.gpu.__doc__), flags=re.MULTILINE)
    table = text_of("docs/kernels.md").partition("## Glossary")[2]
    assert len(words) >= 12
    assert [word for word in words if f"| {word} |" not in table] == []
