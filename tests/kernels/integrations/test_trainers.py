"""Other people's trainers: what they compute from logits, from the fused head, values and gradients in fp32."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dpo.integrations import caller as calling
from fused_dpo.integrations.caller import Answer, Caller
from fused_dpo.integrations.model_forward import add_scoring
from tests.kernels.support.tiny_pairs import in_one_row, padded, tiny
from tests.kernels.support.trainers import PEERS, Peer, as_dict

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama_factory", {}),
    ("llama_factory", {"ld_alpha": 0.3}),
    *(("llama_factory", {"loss_type": loss_type}) for loss_type in ("ipo", "orpo", "simpo")),
    ("ms_swift", {}),
    ("ms_swift", {"ld_alpha": 0.3}),
    ("ms_swift", {"keep": False}),
    ("ms_swift", {"aux_loss": True}),
    ("ms_swift", {"padding_free": True}),
    ("ms_swift", {"padding_free": True, "ld_alpha": 0.3, "keep": False}),
    ("ms_swift", {"padding_free": True, "aux_loss": True}),
    ("openrlhf", {}),
    ("trl-0.28", {}),
    ("trl-0.28", {"ld_alpha": 0.3}),
    ("trl-0.28", {"ld_alpha": 0.3, "keep": True}),
    ("trl-0.28", {"loss_type": ("ipo",), "max_length": 10, "truncation_mode": "keep_end"}),
    ("trl-0.28", {"rpo_alpha": 1.0, "max_length": 8, "truncation_mode": "keep_start"}),
    ("trl-0.28", {"loss_type": ("sigmoid", "sft"), "keep": True}),
    ("trl-0.28", {"padding_free": True}),
    ("trl-0.28", {"aux_loss": True}),
]
"""Trainer and settings."""
OLDER = [(version, settings) for version in ("trl-0.20", "trl-0.24") for name, settings in CASES if name == "trl-0.28"]
"""What is in our words for the newest alone."""


def run(
    function: Callable[..., Any], peer: Peer, trainer: Any, batch: tuple, aux_loss: bool, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results, and the gradients of all weights by a sum in which every result that is trained has its own weight."""
    model = tiny("qwen3_moe" if aux_loss else "llama")
    results = as_dict(function(trainer, peer.model(model), *batch, **kwargs))
    results = {name: value.mean() if name.endswith("_logits") else value for name, value in results.items()}
    trained = [value for name, value in sorted(results.items()) if value.requires_grad and "logits" not in name]
    total = sum((value * torch.linspace(0.5, 2, value.numel()).view_as(value)).sum() for value in trained)
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in results.items()}, gradients


def differences(mine: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    assert mine.keys() == true.keys()
    return {name: float((mine[name] - true[name]).norm() / true[name].norm().clamp(min=1e-6)) for name in true}


def batch_of(peer: Peer, settings: dict[str, Any], side: str) -> tuple[Any, ...]:
    if settings.get("padding_free") and peer is PEERS["ms_swift"]:
        return (in_one_row(),)
    return peer.batch(side)


def compare(name: str, settings: dict[str, Any], side: str, packed: bool, truth: Callable[[Peer, Any], Any]) -> None:
    peer, trainer = PEERS[name], PEERS[name].trainer(**settings)
    batch, aux_loss = batch_of(peer, settings, side), settings.get("aux_loss", False)
    expected, wanted = run(truth(peer, trainer), peer, trainer, batch, aux_loss)
    caller = Caller(packed=packed, **peer.caller)
    got, gradients = run(peer.ours, peer, trainer, batch, aux_loss, caller=caller)
    assert caller.counts.calls == 1
    assert caller.counts.packed_calls == packed
    if packed and "chosen_logits" in expected:  # padding has no rows: see TestMeanLogits
        for each in ("chosen_logits", "rejected_logits"):
            assert got.pop(each).ndim == expected.pop(each).ndim
    for each, true in expected.items():
        torch.testing.assert_close(got[each], true, rtol=1e-5, atol=1e-5, msg=lambda m, n=each: f"{n}: {m}")
    assert got.keys() == expected.keys()
    assert max(differences(gradients, wanted).values()) < 1e-5


def sides(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any], str]]:
    """Each case with padding on either side, where its trainer has both."""
    both = [(name, settings, side) for name, settings in cases for side in ("right", "left")]
    one_way = ("trl", "openrlhf")
    return [
        case for case in both if case[2] == "right" or not (case[0].startswith(one_way) or "padding_free" in case[1])
    ]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
class TestSameResults:
    @pytest.mark.parametrize(("name", "settings", "side"), sides(CASES), ids=str)
    def test_as_in_our_words(self, name: str, settings: dict[str, Any], side: str, packed: bool) -> None:
        compare(name, settings, side, packed, lambda peer, trainer: peer.stand_in)

    @pytest.mark.parametrize(("name", "settings", "side"), sides(CASES + OLDER), ids=str)
    def test_as_their_own_function(self, name: str, settings: dict[str, Any], side: str, packed: bool) -> None:
        compare(name, settings, side, packed, lambda peer, trainer: peer.theirs(trainer))


def test_a_response_that_fills_the_row() -> None:
    """TRL counts the first token of such a response in its length, though nothing predicts it."""
    peer = PEERS["trl-0.28"]
    trainer = peer.trainer(max_length=9, loss_type=("ipo",))
    theirs = peer.theirs(trainer)(trainer, tiny(), *peer.batch("right"))
    ours = peer.ours(trainer, tiny(), *peer.batch("right"), caller=Caller(**peer.caller))
    for each in ("chosen_logps", "rejected_logps"):
        torch.testing.assert_close(ours[each], theirs[each], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "trl-0.28"])
def test_a_reference_is_not_desensitized(name: str) -> None:
    peer = PEERS[name]
    results = {}
    for alpha, is_ref_model in ((None, False), (0.3, True), (0.3, False)):
        trainer = peer.trainer(ld_alpha=alpha)
        caller = Caller(**peer.caller)
        results[alpha, is_ref_model] = peer.ours(trainer, tiny(), *peer.batch("right"), is_ref_model, caller=caller)
    plain, reference, policy = results.values()
    for each in ("chosen_logps", "rejected_logps"):
        assert torch.equal(reference[each], plain[each])
    assert not torch.equal(policy["rejected_logps"], plain["rejected_logps"])
    assert ("nll_loss" in reference) is False


class TestControls:
    """What the comparisons find: each of these mistakes moves a result by far more than their bound."""

    @pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "trl-0.28", "openrlhf"])
    @pytest.mark.parametrize("mistake", ["shift", "mask", "temperature"])
    def test_mistakes_are_found(self, name: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
        call = Caller.__call__

        def wrong(self: Caller, model: Any, inputs: dict[str, Any], labels: Tensor, **settings: Any) -> Answer:
            if mistake == "shift":
                labels = labels.roll(-1, 1).where(labels.roll(-1, 1).ne(-100) & inputs["attention_mask"].bool(), -100)
            if mistake == "mask":  # the first token is not seen
                seen = inputs["attention_mask"]
                inputs = inputs | {"attention_mask": seen * (seen.cumsum(1) > 1)}
            if mistake == "temperature":
                settings = {"temperature": 1.01}
            return call(self, model, inputs, labels, **settings)

        monkeypatch.setattr(Caller, "__call__", wrong)
        with pytest.raises(AssertionError, match=r"chosen_logps|0: "):
            compare(name, {}, "right", False, lambda peer, trainer: peer.stand_in)


class TestMeanLogits:
    def test_are_those_of_the_tokens_in_a_packed_batch(self) -> None:
        """And, without padding, those of the batch as it is."""
        peer, model = PEERS["llama_factory"], tiny()
        for batch in (padded("left"), {name: value[[0, 3]][:, :9] for name, value in padded("right").items()}):
            caller = Caller(with_means=True)
            got = peer.ours(peer.trainer(), model, batch, caller=caller)
            with torch.no_grad():
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            kept = batch["attention_mask"].bool()
            for half, each in enumerate(("chosen_logits", "rejected_logits")):
                expected = logits.chunk(2)[half][kept.chunk(2)[half]].mean()
                torch.testing.assert_close(got[each], expected, rtol=1e-5, atol=1e-6)
        assert kept.all()
        assert caller.counts.packed_calls == 1

    def test_softcap(self) -> None:
        """Not a number for LLaMA-Factory, which means all logits; right for those who mean scored rows."""
        model = tiny("gemma2", final_logit_softcapping=1.5)
        peer = PEERS["llama_factory"]
        assert peer.ours(peer.trainer(), model, padded("right"), caller=Caller(with_means=True))[
            "chosen_logits"
        ].isnan()
        peer, model = PEERS["ms_swift"], tiny("gemma2", final_logit_softcapping=1.5)
        expected = peer.stand_in(peer.trainer(), model, padded("right"))
        got = peer.ours(peer.trainer(), model, padded("right"), caller=Caller(**peer.caller))
        torch.testing.assert_close(got["mean_chosen_logits"], expected["mean_chosen_logits"], rtol=1e-5, atol=1e-5)


class TestWrappers:
    """The trainer's own call of the model is what happens."""

    class Engine(nn.Module):
        """As DeepSpeed's: holds the model as `module`, and has every attribute of it."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._modules["module"] = vars(self)["module"] = module
            self.called = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["module"], name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.called += 1
            return vars(self)["module"](*args, **kwargs)

    @pytest.mark.parametrize("name", list(PEERS))
    def test_an_engine_is_called(self, name: str) -> None:
        peer = PEERS[name]
        batch, engine = peer.batch("right"), self.Engine(tiny())
        bare = as_dict(peer.ours(peer.trainer(), peer.model(tiny()), *batch, caller=Caller(**peer.caller)))
        caller = Caller(**peer.caller)
        wrapped = as_dict(peer.ours(peer.trainer(), peer.model(engine), *batch, caller=caller))
        assert engine.called == caller.counts.packed_calls == 1
        for each in bare:
            torch.testing.assert_close(wrapped[each], bare[each], equal_nan=True)

    def test_peft_below_compile_and_ddp(self) -> None:
        peft = pytest.importorskip("peft")
        model = tiny()
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        )
        assert calling.below_wrappers(self.Engine(torch.compile(adapted))) is model  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "trl-0.28"])
    def test_adapters_and_the_reference_below_them(self, name: str) -> None:
        """LoRA on attention and head, switched on and off: policy and reference in one model, packed."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny(), config).eval()
        peer, caller = PEERS[name], Caller(**PEERS[name].caller)
        outputs = []
        for context in (nullcontext(), model.disable_adapter()):
            with context, torch.no_grad():
                expected = peer.stand_in(peer.trainer(), model, *peer.batch("right"))
                got = peer.ours(peer.trainer(), model, *peer.batch("right"), caller=caller)
            outputs.append(got["chosen_logps"])
            torch.testing.assert_close(outputs[-1], expected["chosen_logps"], rtol=1e-5, atol=1e-5)
        assert float((outputs[0] - outputs[1]).abs().min()) > 0.01, "control: the adapters matter"
        assert caller.counts.packed_calls == 2

    def test_autocast_of_a_trainer(self) -> None:
        """Entered around the call, as a model that was prepared before has its own forward below ours."""
        seen = []

        class Watched(self.Engine):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                seen.append(torch.is_autocast_enabled("cpu"))
                return super().forward(*args, **kwargs)

        for name in ("llama_factory", "ms_swift", "trl-0.28"):
            peer = PEERS[name]
            trainer = peer.trainer()
            trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
            peer.ours(trainer, Watched(tiny()), *peer.batch("right"), caller=Caller(**peer.caller))
        assert seen == [True] * 3

    def test_a_hook_that_drops_the_labels(self) -> None:
        """As those of ms-swift's multimodal templates do: an error, not logits that are taken for something else."""
        model = tiny()

        def keep_known(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {name: kwargs[name] for name in ("input_ids", "attention_mask")}

        model.register_forward_pre_hook(keep_known, with_kwargs=True)
        peer = PEERS["ms_swift"]
        with pytest.raises(NotImplementedError, match="a hook on it drops arguments that it does not know"):
            peer.ours(peer.trainer(), model, padded("right"), caller=Caller(**peer.caller))


class TestCallers:
    def test_the_next_one_takes_the_place_of_the_last(self) -> None:
        """And its settings are what counts from then on; a model that scores for a user is refused."""
        model, batch = tiny(), padded("right")
        labels = batch.pop("labels")
        first, second = Caller(packed=False), Caller(packed=True)
        for caller in (first, second, second):
            caller(model, batch, labels)
        assert (first.counts.calls, first.counts.packed_calls) == (1, 0)
        assert (second.counts.calls, second.counts.packed_calls) == (2, 2)
        other = tiny()
        add_scoring(other)
        with pytest.raises(RuntimeError, match=r"already; remove_scoring\(model\)"):
            first(other, batch, labels)

    def test_a_copy_scores_with_its_own_weights(self) -> None:
        """As a reference that is copied from a policy that has been called already."""
        model, batch, caller = tiny(), padded("right"), Caller()
        labels = batch.pop("labels")
        policy = caller(model, batch, labels).tokens.logps
        reference = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
        assert torch.equal(caller(reference, batch, labels).tokens.logps, policy)
        assert not torch.equal(caller(model, batch, labels).tokens.logps, policy)
        assert caller.counts.packed_calls == 3

    def test_other_calls_are_the_models_own(self) -> None:
        model, own, batch = tiny(), tiny(), padded("right")
        labels = batch.pop("labels")
        Caller(packed=False)(model, batch, labels)
        assert torch.equal(model(**batch).logits, own(**batch).logits)

    def test_a_model_without_a_load_balancing_loss(self) -> None:
        batch: dict[str, Any] = padded("right") | {"output_router_logits": True}
        labels = batch.pop("labels")
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM has no load-balancing loss"):
            Caller(packed=False)(tiny(), batch, labels)


REFUSED = [
    ("ms_swift", {"sequence_parallel_size": 2}, "sequence_parallel_size=2"),
    ("trl-0.28", {"use_weighting": True}, "use_weighting"),
    ("trl-0.28", {"padding_free": True, "loss_type": ("ipo",)}, "ipo with padding_free"),
    ("trl-0.28", {"padding_free": True, "ld_alpha": 0.5}, "ld_alpha with padding_free"),
    ("trl-0.28", {"padding_free": True, "rpo_alpha": 1.0}, "rpo_alpha, sft"),
    ("openrlhf", {"ring_attn_group": "a group"}, "ring attention"),
    ("openrlhf", {"ds_tensor_parallel_size": 2}, "tensor parallelism"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED, ids=str)
def test_refused_by_name(name: str, settings: dict[str, Any], reason: str) -> None:
    peer = PEERS[name]
    with pytest.raises(NotImplementedError, match=reason):
        peer.ours(peer.trainer(**settings), peer.model(tiny()), *peer.batch("right"), caller=Caller(**peer.caller))


@pytest.mark.parametrize("name", ["ms_swift", "trl-0.28"])
def test_encoder_decoders_are_refused(name: str) -> None:
    peer = PEERS[name]
    trainer = peer.trainer()
    trainer.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match="encoder-decoders"):
        peer.ours(trainer, tiny(), *peer.batch("right"), caller=Caller(**peer.caller))


def test_images_are_refused_in_trl() -> None:
    peer = PEERS["trl-0.28"]
    (batch,) = peer.batch("right")
    with pytest.raises(NotImplementedError, match="images"):
        peer.ours(peer.trainer(), tiny(), batch | {"pixel_values": torch.ones(1)}, caller=Caller(**peer.caller))
