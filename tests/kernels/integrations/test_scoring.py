"""Log-probs from the forward of a patched model, against log-softmax of the model's own logits."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fused_dpo import KernelOptions
from fused_dpo.integrations import scoring
from fused_dpo.integrations.model_forward import add_scoring, remove_scoring
from fused_dpo.integrations.scoring import Counts
from fused_dpo.models import fused_head
from tests.fresh_process import hide, run, run_ranks
from tests.kernels.support import tiny_pairs
from tests.kernels.support.tiny_pairs import VOCAB

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 4},
    "qwen3_moe": {"output_router_logits": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tiny(family: str = "llama") -> Any:
    return tiny_pairs.tiny(family, pad_token_id=0, **FAMILIES[family])


def batch(side: str = "right") -> dict[str, Tensor]:
    """Two pairs, the first with one prompt, the second without anything in common; padded on a side."""
    random = torch.Generator().manual_seed(1)
    prompt, *answers = (torch.randint(1, VOCAB, (n,), generator=random).tolist() for n in (5, 4, 7, 9, 3))
    rows = [prompt + answers[0], answers[2], prompt + answers[1], answers[3]]
    scored_from = [5, 2, 5, 1]
    width = max(map(len, rows)) + 1
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for row, (tokens, first) in enumerate(zip(rows, scored_from, strict=True)):
        at = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, at], mask[row, at] = torch.tensor(tokens), 1
        labels[row, at.start + first : at.stop] = ids[row, at.start + first : at.stop]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def true_logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """[N, S] by the model's own logits, a sequence at a time."""
    rows = []
    for tokens, seen, wanted in zip(ids, mask.bool(), labels, strict=True):
        logps = model(input_ids=tokens[seen][None], use_cache=False).logits[0].log_softmax(-1)
        chosen = logps[:-1].gather(1, tokens[seen][1:, None])[:, 0] * (wanted[seen][1:] != -100)
        at = seen.nonzero()[:-1, 0]
        rows.append(chosen.new_zeros(len(tokens)).index_copy(0, at, chosen))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients(family, packed, side):
    """Sums with weights of their own for each token, so that a token in another's place shows."""
    own, model = tiny(family), tiny(family)
    counts = add_scoring(model, packed=packed)
    given = batch(side)
    labels = given.pop("labels")
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    expected = true_logps(own, given["input_ids"], given["attention_mask"], labels)
    got = model(**given, fused_dpo_labels=labels).tokens.logps
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, true in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-3, atol=1e-4)
    tokens, shared = int(given["attention_mask"].sum()), 5
    assert counts == Counts(1, int(packed), tokens - shared if packed else labels.numel())


def test_stats_are_where_the_log_probs_are():
    model = tiny()
    add_scoring(model)
    given = batch()
    labels = given.pop("labels")
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits.log_softmax(-1)
        tokens = model(**given, fused_dpo_labels=labels, fused_dpo_stats=("entropy", "is_top1")).tokens
    scored = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    entropy = -(logits.exp() * logits).sum(-1) * scored
    torch.testing.assert_close(tokens.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens.is_top1, (logits.argmax(-1) == given["input_ids"].roll(-1, 1)) & scored)
    assert tokens.mean_logit is None


def test_router_logits_are_those_of_the_padded_batch():
    results = {}
    for packed in (True, False):
        model = tiny("qwen3_moe")
        add_scoring(model, packed=packed)
        given = batch()
        labels = given.pop("labels")
        scored = model(**given, output_router_logits=True, fused_dpo_labels=labels)
        results[packed] = [layer[given["attention_mask"].flatten() > 0] for layer in scored.router_logits]
    assert len(results[True]) == 2
    for packed, padded in zip(results[True], results[False], strict=True):
        # Around 1 in fp32, behind a layer whose sums are taken in another order; 3e-7 measured.
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-6)


def test_sequences_in_one_row():
    """As a collator without padding gives them: positions begin anew, and what sequences share is computed once."""
    model = tiny()
    counts = add_scoring(model)
    given = batch()
    seen = given["attention_mask"].bool()
    expected = model(input_ids=given["input_ids"], attention_mask=seen.long(), fused_dpo_labels=given["labels"])
    positions = torch.cat([torch.arange(int(length)) for length in seen.sum(1)])[None]
    row = {"input_ids": given["input_ids"][seen][None], "position_ids": positions}
    got = model(**row, cu_seq_lens_q=torch.tensor([0]), fused_dpo_labels=given["labels"][seen][None])
    assert torch.equal(got.tokens.logps[0], expected.tokens.logps[seen])
    assert counts.packed_calls == 2
    assert counts.slots == 2 * (int(seen.sum()) - 5)


def test_other_inputs_are_computed_as_they_come():
    """A batch with embeddings is not packed; it says so, counts it, and is right."""
    model = tiny()
    counts = add_scoring(model)
    given = batch()
    labels, ids = given.pop("labels"), given["input_ids"]
    expected = model(**given, fused_dpo_labels=labels).tokens.logps
    embeds = model.get_input_embeddings()(ids)
    with pytest.warns(UserWarning, match=r"batches with inputs_embeds, no input_ids padded, as they come"):
        got = model(inputs_embeds=embeds, attention_mask=given["attention_mask"], fused_dpo_labels=labels)
    torch.testing.assert_close(got.tokens.logps, expected, rtol=1e-5, atol=1e-5)
    assert (counts.calls, counts.packed_calls) == (2, 1)


@pytest.mark.parametrize("shift", [0, 1])
def test_positions(shift):
    """Those that the mask counts are packed; others are left to the model."""
    model = tiny()
    counts = add_scoring(model)
    given = batch("left")
    labels = given.pop("labels")
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0) + shift
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if shift else "error")
        model(**given, position_ids=positions, fused_dpo_labels=labels)
    assert counts.packed_calls == 1 - shift


def test_nothing_scored():
    """A micro-batch of prompts alone gives zeros, connected to the weights."""
    model = tiny()
    add_scoring(model)
    given = batch()
    logps = model(**given | {"labels": None}, fused_dpo_labels=torch.full_like(given["labels"], -100)).tokens.logps
    assert logps.abs().sum() == 0
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class TestOtherCalls:
    def test_are_the_models_own(self):
        own, model = tiny(), tiny()
        add_scoring(model)
        given = batch("left")
        seen = given["attention_mask"].bool()
        expected, got = own(**given), model(**given)
        torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.loss, expected.loss)

    def test_generation(self):
        own, model = tiny(), tiny()
        add_scoring(model)
        given = batch("left")
        del given["labels"]
        assert torch.equal(*(m.generate(**given, max_new_tokens=5, do_sample=False) for m in (own, model)))

    def test_positional_arguments(self):
        model = tiny()
        add_scoring(model)
        given = batch()
        by_name = model(**given | {"labels": None}, fused_dpo_labels=given["labels"])
        by_place = model(given["input_ids"], given["attention_mask"], fused_dpo_labels=given["labels"])
        assert torch.equal(by_name.tokens.logps, by_place.tokens.logps)

    def test_removed(self):
        model = tiny()
        add_scoring(model)
        remove_scoring(model)
        assert "forward" not in vars(model)
        add_scoring(model)


class TestAdapters:
    def test_added_after_scoring_was(self):
        """Another layer stands in the head's place then; both can be taken away again."""
        from peft import LoraConfig, get_peft_model

        model, given = tiny(), batch()
        add_scoring(model)
        bare = model(**given | {"labels": None}, fused_dpo_labels=given["labels"]).tokens.logps
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
        inputs = {name: values for name, values in given.items() if name != "labels"}
        got = adapted(**inputs, fused_dpo_labels=given["labels"]).tokens.logps
        logits = adapted(**inputs).logits[:, :-1].log_softmax(-1)
        expected = logits.gather(-1, given["labels"][:, 1:, None].clamp(min=0))[..., 0]
        expected = expected * (given["labels"][:, 1:] != -100)
        # Some nat each, in fp32; what is not scored is 0 in both. 2e-7 measured.
        torch.testing.assert_close(got[:, :-1], expected, rtol=1e-6, atol=0)
        assert (got - bare).abs().max() > 0.01, "control: the adapter matters"
        remove_scoring(adapted)
        assert "forward" not in vars(model)
        assert "forward" not in vars(model.lm_head)

    @pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
    def test_log_probs_and_gradients(self, targets):
        from peft import LoraConfig, get_peft_model

        def adapted():
            torch.manual_seed(3)
            return get_peft_model(tiny(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()

        own, model = adapted(), adapted()
        counts = add_scoring(model)
        given = batch()
        labels = given.pop("labels")
        expected = true_logps(own, given["input_ids"], given["attention_mask"], labels)
        got = model(**given, fused_dpo_labels=labels).tokens.logps
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)
        assert counts.packed_calls == 1  # peft passes a None for every argument that it knows
        expected.sum().backward()
        got.sum().backward()
        for mine, true in zip(model.parameters(), own.parameters(), strict=True):
            assert (mine.grad is None) == (true.grad is None)
            if true.grad is not None:
                torch.testing.assert_close(mine.grad, true.grad, rtol=1e-3, atol=1e-4)


class TestRefusals:
    def test_twice(self):
        model = tiny()
        add_scoring(model)
        with pytest.raises(RuntimeError, match=r"computes log-probs by fused_dpo already; remove_scoring\(model\)"):
            add_scoring(model)

    def test_a_head_that_is_read_wrongly(self, monkeypatch):
        """The first call compares it with the model's own logits; later ones do not."""
        model, given = tiny(), batch()
        read = fused_head.head_of
        monkeypatch.setattr(fused_head, "head_of", lambda model: replace(read(model), logit_scale=1.1))
        add_scoring(model)
        inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
        with pytest.raises(ValueError, match="the head of LlamaForCausalLM is not read as the model applies it"):
            model(**inputs, fused_dpo_labels=given["labels"])
        monkeypatch.setattr(fused_head, "head_of", read)
        model(**inputs, fused_dpo_labels=given["labels"])
        monkeypatch.setattr(scoring, "check_head", None)
        model(**inputs, fused_dpo_labels=given["labels"])

    def test_a_model_that_cannot_be_packed(self):
        config = AutoConfig.for_model("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match=r"BloomForCausalLM .*packed=False scores it in padded batches"):
            add_scoring(model)
        assert add_scoring(model, packed=False) == Counts()

    def test_gaps_in_a_mask(self):
        model = tiny()
        add_scoring(model)
        given = batch()
        given["attention_mask"][1, 1] = 0
        with pytest.raises(ValueError, match="attention_mask has gaps within sequence 1"):
            model(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], fused_dpo_labels=given["labels"]
            )

    def test_scored_padding(self):
        model = tiny()
        add_scoring(model)
        given = batch()
        given["labels"][0, -1] = 7
        width = given["labels"].shape[1]
        with pytest.raises(ValueError, match=rf"labels\[0, {width - 1}\] is scored, but lies in padding"):
            model(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], fused_dpo_labels=given["labels"]
            )


def test_settings_reach_the_kernels():
    model = tiny()
    add_scoring(model, grad_mode="filtered", options=KernelOptions(impl="reference"))
    given = batch()
    with pytest.raises(ValueError, match="'reference' is the exact oracle"):
        model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], fused_dpo_labels=given["labels"])


def test_a_copy_keeps_its_own_forward():
    """A reference made by deepcopy scores with its own weights, not with those of the model it was copied from."""
    model = tiny()
    add_scoring(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    given = batch()
    labels = given.pop("labels")
    with torch.no_grad():
        logps, others = (m(**given, fused_dpo_labels=labels).tokens.logps for m in (model, twin))
        logits, halved = (m(**given).logits for m in (model, twin))
    assert not torch.equal(logps, others)
    torch.testing.assert_close(halved, logits / 2)


class TestForwardOfTheInstance:
    """As accelerate puts one there for mixed precision."""

    def test_autocast_ends_with_the_call(self):
        """One autocast object around the forward, as accelerate's: the check of the head does not enter it again."""
        model = tiny()
        add_scoring(model)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        given = batch()
        labels = given.pop("labels")
        for _ in range(2):
            model(**given, fused_dpo_labels=labels)
            assert not torch.is_autocast_enabled("cpu")

    def test_is_called_and_comes_back(self):
        model, given = tiny(), batch()
        calls = []
        own = model.forward

        def instance_forward(*args, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        model.forward = instance_forward
        add_scoring(model)
        model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        assert calls == [1]
        remove_scoring(model)
        assert model.forward is instance_forward

    def test_one_around_ours_is_not_thrown_away(self):
        accelerate = pytest.importorskip("accelerate")
        model = tiny()
        add_scoring(model)
        ours = model.forward
        model.forward = accelerate.utils.convert_outputs_to_fp32(model.forward)
        with pytest.raises(RuntimeError, match="was replaced again after add_scoring"):
            remove_scoring(model)
        model.forward = ours
        remove_scoring(model)
        assert "forward" not in vars(model)


def test_packing_needs_none_of_the_trainers_packages(tmp_path: Path) -> None:
    """Other trainers pin what they like: beside torch, NumPy and transformers nothing is imported."""
    code = (
        "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "from fused_dpo.integrations import add_scoring\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, "
        "num_attention_heads=2))\n"
        "counts = add_scoring(model)\nids = torch.tensor([[1, 2, 3], [1, 2, 4]])\n"
        "model(input_ids=ids, fused_dpo_labels=ids).tokens.logps.sum().backward()\nprint(counts.packed_calls)"
    )
    hidden = hide("peft", "datasets", "pyarrow", "tyro", "rich", "tensorboard", "trl", "accelerate", "bitsandbytes")
    assert run(hidden + code, tmp_path).strip() == "1"


def test_two_sharded_ranks(tmp_path: Path) -> None:
    """A pair each, the head in FSDP2's root unit or one of its own: the gradients of one process with both."""
    from tests.kernels.support.sharded_ranks import gradients

    file = tmp_path / "gradients.pt"
    finished = run_ranks(2, "tests.kernels.support.sharded_ranks", file)
    assert finished.returncode == 0, finished.stderr[-8000:]
    made, expected, half = torch.load(file), gradients(range(4)), gradients([0, 2])
    assert len(made) == 2
    for got in made:
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4)
    apart = max(float((half[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items())
    assert apart > 0.1, "control: one rank's pairs alone have others"
