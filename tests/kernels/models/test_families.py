"""The table of heads in docs/drop-in.md: tiny models of many families against their own logits."""

import re
from typing import Any

import pytest

from fused_dpo import LMHead, check_head
from tests.kernels.support.families import BEGIN, DOCUMENT, END, FAMILIES, build_or_skip, read, tokens

FAMILY = {family.name: family for family in FAMILIES}
_TEXT = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
WRITTEN = {row.split(" | ")[0]: row for row in re.findall(r"^\| (\w.*) \|$", _TEXT, re.MULTILINE)[1:]}
REWRITE = "python -m tests.kernels.support.families writes the table anew"


def test_the_table_has_these_families() -> None:
    assert list(WRITTEN) == [family.name for family in FAMILIES], REWRITE


@pytest.mark.parametrize("name", FAMILY)
def test_the_table_is_right(name: str) -> None:
    family = FAMILY[name]
    model: Any = build_or_skip(family)
    if name == "llama4":
        try:
            model(input_ids=tokens()[None])
        except AttributeError as broken:  # transformers 5.24, of calls without images
            pytest.skip(f"the model's own forward fails with this transformers: {broken}")
    error, reason = read(family)
    _, cls, result = WRITTEN[name].split(" | ", 2)
    assert cls == f"`{family.cls}`", REWRITE
    assert (result == f"refused: {reason}") == (error is None), REWRITE
    # 1e-5 nat: both sides multiply the same fp32 hidden states by the same weight; logits are up to 10 nat.
    assert error is None or max(error, float(result)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        *("gemma2", "gemma4_text", "recurrent_gemma", "cohere", "granite", "hyperclovax", "minicpm3", "falcon_h1"),
        *("phi", "inkling", "inkling2", "paligemma", "t5, tied", "umt5", "bart", "marian"),
    ],
)
def test_control_the_bare_weight_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a scale, softcap, bias or cut that is not read shows as an error."""
    from fused_dpo.models import fused_head

    model = build_or_skip(FAMILY[name])
    head = fused_head.head_of(model)
    weight = head.weight
    if name == "paligemma" and head.softcap is None:
        pytest.skip("this transformers does not cap PaliGemma's logits")
    whole = weight if weight._base is None else weight._base
    monkeypatch.setattr(fused_head, "head_of", lambda _: LMHead(whole))
    with pytest.raises(ValueError, match=rf"the head of {FAMILY[name].cls} is not read as the model applies it"):
        check_head(model, tokens())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cohere2_vision", {"logit_scale": 0.25}),
        ("aya_vision", {"logit_scale": 0.25}),
        ("granite_speech", {"logit_scale": 0.125}),
        ("gemma3", {"softcap": 3.0}),
    ],
)
def test_control_what_the_text_configuration_says_is_caught(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: these classes leave out what their text configuration names."""
    from fused_dpo.models import fused_head

    model = build_or_skip(FAMILY[name])
    head = fused_head.head_of(model)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    monkeypatch.setattr(fused_head, "head_of", lambda _: LMHead(head.weight, **changes))
    with pytest.raises(ValueError, match="is not read as the model applies it"):
        check_head(model, tokens())
