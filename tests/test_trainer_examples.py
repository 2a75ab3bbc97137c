"""The examples with other people's trainers: three steps of each are those of a loop of plain torch with logits."""

import ast
import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import with_accelerate, with_hf_trainer, with_torchtune
from tests.kernels.support.peers import cut, source_of
from tests.kernels.support.tiny_pairs import VOCAB, padded, tiny

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("with_*.py"))


def logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Score sequences, [N], by the model's own logits."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * (labels != -100)).sum(1)


def plain_loop(model: Any, steps: list[list[dict[str, Tensor]]], optimizer: torch.optim.Optimizer) -> list[float]:
    """Train on the micro-batches of each step; the loss of each step."""
    reference, losses = copy.deepcopy(model), []
    for batches in steps:
        total = 0.0
        for batch in batches:
            chosen, rejected = logps(model, batch).chunk(2)
            with torch.no_grad():
                ref_chosen, ref_rejected = logps(reference, batch).chunk(2)
            margins = chosen - rejected - (ref_chosen - ref_rejected)
            loss = -F.logsigmoid(0.1 * margins).mean() / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[dict[str, Tensor]]:
    """Note the batches that an example collates, in their order."""
    collate, seen = module.collate, []

    def record(pairs: Any) -> dict[str, Tensor]:
        seen.append(collate(pairs))
        return {name: value.clone() for name, value in seen[-1].items()}

    monkeypatch.setattr(module, "collate", record)
    return seen


def assert_same_weights(mine: Any, true: Any, start: nn.Module, bound: float) -> None:
    weights = zip(mine.parameters(), true.parameters(), start.parameters(), strict=True)
    with torch.no_grad():
        for number, (got, expected, before) in enumerate(weights):
            assert float((got - expected).norm() / (expected - before).norm()) < bound, number


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    """Leave no precision of one test's Accelerator to the next one's."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    folder = str(tmp_path / "model")
    tiny(tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("accumulated", [1, 2])
def test_hf_trainer(accumulated: int, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SGD, as Adam would hide a factor on the gradients: accumulated steps are a mean, not a sum."""
    from transformers import AutoModelForCausalLM

    batches = recorded(monkeypatch, with_hf_trainer)
    trainer = with_hf_trainer.main(
        saved,
        str(tmp_path / "run"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny(tie_word_embeddings=True)
    steps = [batches[accumulated * step : accumulated * (step + 1)] for step in range(3)]
    expected = plain_loop(model, steps, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, abs=1e-4)  # it rounds what it logs to four digits
    assert abs(expected[2] - expected[0]) > 1e-2, "control: it learns"
    start = tiny(tie_word_embeddings=True)
    assert_same_weights(trainer.model, model, start, 1e-3)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert_same_weights(checkpoint, trainer.model, start, 1e-6)


def test_hf_trainer_in_mixed_precision(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbones of policy and reference compute under autocast, which lives in the call of the model."""
    from transformers.models.llama.modeling_llama import LlamaModel

    seen, forward = [], LlamaModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "fused_dpo_plan" in kwargs:
            seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    with_hf_trainer.main(saved, str(tmp_path / "run"), bf16=True, **settings)
    assert seen == [True] * 6


def test_accelerate(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is saved is the model's, without the wrapper's prefix."""
    from transformers import AutoModelForCausalLM

    batches = recorded(monkeypatch, with_accelerate)
    losses = with_accelerate.main(saved, str(tmp_path / "trained"))
    model, start = tiny(tie_word_embeddings=True), tiny(tie_word_embeddings=True)
    expected = plain_loop(model, [[batch] for batch in batches[:3]], torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert abs(expected[2] - expected[0]) > 1e-3, "control: it learns"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    # Adam divides each gradient by its own size: those that are rounding alone differ.
    assert_same_weights(trained, model, start, 1e-2)


class Decoder(nn.Module):
    """torchtune's TransformerDecoder, as far as its recipes see it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(VOCAB, 32)
        self.layer = nn.GRU(32, 32, batch_first=True)
        self.norm = nn.RMSNorm(32)
        self.output: Any = Tied(self.tok_embeddings) if tied else nn.Linear(32, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.layer(self.tok_embeddings(tokens))[0])).float()


class Tied:
    """torchtune's TiedLinear: no module, it holds one."""

    def __init__(self, tied_module: nn.Embedding) -> None:
        self.tied_module = tied_module

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden @ self.tied_module.weight.mT


def stand_in(recipe: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What the recipe's function computes from logits, in our words."""
    logits = model(batch[0])
    labels = batch[1][:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return *(picked * (labels != -100)).sum(1).chunk(2), *logits.chunk(2)


def theirs(recipe: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    known = {"torch": torch, "F": F, "CROSS_ENTROPY_IGNORE_IDX": -100}
    names = ["logits_to_logprobs", "get_batch_log_probs"]
    known = cut(source_of("torchtune/rlhf/sequence_processing.py"), names, known)
    known["rlhf"] = SimpleNamespace(get_batch_log_probs=known["get_batch_log_probs"])
    cut(source_of("recipes/lora_dpo_single_device.py", "torchtune"), ["concatenated_forward"], known)
    return known["concatenated_forward"](recipe, model, batch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("truth", [stand_in, theirs])
def test_torchtune(truth: Any, tied: bool) -> None:
    recipe = SimpleNamespace(_device="cpu", activations_handling_ctx=nullcontext())
    own, model, given = Decoder(tied), Decoder(tied), padded("right")
    batch = given["input_ids"], given["labels"]
    results = truth(recipe, own, batch)
    for _ in range(2):
        model.zero_grad()
        got = with_torchtune.concatenated_forward(recipe, model, batch)
        for mine, true in zip(got, results, strict=True):
            torch.testing.assert_close(mine, true.mean() if true.ndim > 1 else true, rtol=1e-5, atol=1e-5)
        (got[0] - 2 * got[1]).sum().backward()
    (results[0] - 2 * results[1]).sum().backward()
    for (name, mine), true in zip(model.named_parameters(), own.parameters(), strict=True):
        assert mine.grad is not None
        assert true.grad is not None
        assert float((mine.grad - true.grad).norm() / true.grad.norm()) < 1e-5, name
    assert model.state_dict().keys() == own.state_dict().keys()
    torch.testing.assert_close(model(batch[0]), own(batch[0]))


def test_torchtune_refuses_an_adapter_on_the_head() -> None:
    model = Decoder(tied=False)
    model.output.lora_a = nn.Linear(32, 2)
    with pytest.raises(NotImplementedError, match="apply_lora_to_output=False"):
        with_torchtune.scoring_head(model)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(text))
