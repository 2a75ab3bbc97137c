"""A model as a module that gives log-probs: what it returns, how it is saved, and that DDP reduces its gradients."""

from pathlib import Path

import pytest
import torch

from fused_dpo.integrations import LogpsModel
from tests.fresh_process import run_ranks
from tests.kernels.support.tiny_pairs import padded, tiny
from tests.kernels.support.trainers import scored_tokens
from tests.kernels.support.wrapped_ranks import gradients


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_values(packed: bool, average: bool) -> None:
    batch, own = padded("left"), tiny()
    wrapped = LogpsModel(tiny(), packed=packed, average=average)
    logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = [row.logps for row in scored_tokens(logits, batch["labels"])]
    expected = torch.stack([row.mean() if average else row.sum() for row in rows])
    torch.testing.assert_close(wrapped(**batch), expected, rtol=1e-5, atol=1e-5)
    assert wrapped.counts.packed_calls == packed


def test_without_a_mask_and_with_nothing_scored() -> None:
    ids = torch.randint(60, (2, 5))
    wrapped = LogpsModel(tiny(), average=True)
    assert wrapped(ids, labels=torch.full_like(ids, -100)).tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match=r"needs labels \[N, S\]"):
        wrapped(ids)


def test_the_model_is_saved_without_the_wrapper(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own, wrapped = tiny(), LogpsModel(tiny())
    assert wrapped.model.state_dict().keys() == own.state_dict().keys()
    assert set(wrapped.state_dict()) == {f"model.{name}" for name in own.state_dict()}
    wrapped.model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), own.parameters(), strict=True))


def of_two_ranks(way: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    finished = run_ranks(2, "tests.kernels.support.wrapped_ranks", folder / way, way)
    assert finished.returncode == 0, finished.stderr[-8000:]
    return [torch.load(folder / f"{way}.{rank}") for rank in range(2)]


def test_two_ranks(tmp_path: Path) -> None:
    """Each with a pair, as one process with both; called beside DDP ranks differ, which this would find."""
    expected = gradients(0, 1, "whole")
    reduced, beside = of_two_ranks("whole", tmp_path), of_two_ranks("beside", tmp_path)
    names = [f"model.{name}" for name, _ in tiny().named_parameters()]
    assert set(names) == expected.keys()
    for name in names:
        assert torch.equal(reduced[0][name], reduced[1][name])
        assert float((reduced[0][name] - expected[name]).norm() / expected[name].norm()) < 1e-5
        assert not torch.equal(beside[0][name], beside[1][name])
