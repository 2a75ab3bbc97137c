"""The load-balancing loss of a mixture of experts: what is counted, its gradient, and when it is added."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.batching.sharing import place_sequences
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UnsupportedModelError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.router_loss import router_loss_of
from tests.engine.support.policies import BATCH, CPU, LAYOUTS, ORDER, PAIRS, policy_of
from tests.engine.support.runs import FIRST_LOSS
from tests.engine.support.toys import (
    eager_twin,
    gradients,
    largest_difference,
    save_folder,
    tiny_model,
    worst_gradient_error,
)

EXPERTS, TOP = 4, 2
ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
MOES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP},
    "qwen2_moe": {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": TOP},
    "flex_olmo": {"num_experts": EXPERTS, "num_experts_per_tok": TOP},
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP},
}


def moe(family: str = "mixtral", **settings: Any) -> Any:
    """In float32, as grouped products of experts have no other."""
    return tiny_model(family, **{"dtype": torch.float32, "scale": 3.0, **MOES[family], **ASKED, **settings})


def skip_without_router_logits(model: Any) -> None:
    output = model(input_ids=torch.ones(1, 2, dtype=torch.int64), output_router_logits=True)
    if output.router_logits is None:
        pytest.skip(f"{type(model).__name__} gives no router logits with this transformers")


def policy_with_loss(model: Any) -> Any:
    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    return policy_of(model, router_loss=router_loss_of(below)[0])


def by_hand(layers: list[Tensor]) -> Tensor:
    """Equations 4 to 6 of Switch Transformers over the rows [rows, E] of all layers."""
    probabilities = torch.cat(layers).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(TOP).indices, 1.0)
    return EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()


def rows_of_sequences(model: Any, *, share: bool) -> list[Tensor]:
    """Router logits of each layer by the model's own forward on one sequence at a time, each row counted once."""
    layers: list[list[Tensor]] = []
    for placement in place_sequences(PAIRS, ORDER, share=share):
        tokens = torch.from_numpy(placement.ids).long()[None]
        logits = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
        layers.append([one.reshape(-1, EXPERTS)[placement.shared :] for one in logits])
    return [torch.cat(rows) for rows in zip(*layers, strict=True)]


class TestValue:
    @pytest.mark.parametrize("family", MOES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_packed_row_counts_once(self, family, layout):
        model = moe(family)
        twin = eager_twin(model)
        skip_without_router_logits(twin)
        router = policy_with_loss(model)(LAYOUTS[layout]).router
        expected = by_hand(rows_of_sequences(twin, share=layout == "shared"))
        # 1e-5 and 1e-4: fp32 on both sides, in other orders of summing.
        assert float(router) == pytest.approx(float(expected), rel=1e-5)
        other = by_hand(rows_of_sequences(twin, share=layout != "shared"))
        assert abs(float(other - expected)) > 1e-5, "control: what is counted matters"
        grads = gradients_of(twin, expected)
        assert worst_gradient_error(gradients_of(model, router), grads) < 1e-4

    @pytest.mark.parametrize("family", MOES)
    def test_padding_does_not_count(self, family):
        model = moe(family, attention="eager")
        skip_without_router_logits(model)
        batch = pad(PAIRS, ORDER)
        router = policy_with_loss(model)(batch).router
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True)
        assert float(router) == pytest.approx(float(own.aux_loss), rel=1e-6)
        whole = model(input_ids=batch.input_ids, output_router_logits=True)
        assert abs(float(router - whole.aux_loss)) > 1e-4, "control: with the padding it is another"

    def test_balance(self):
        """With all logits alike every token counts for the same experts, each with probability 1 / E."""
        loss, _ = router_loss_of(moe())
        assert loss is not None
        value = loss([torch.zeros(1, 5, EXPERTS)], None)
        assert value is not None
        assert float(value) == pytest.approx(TOP)


def gradients_of(model: Any, value: Tensor) -> dict[str, Tensor]:
    """As `gradients`, with 0 for what the value does not depend on (the head)."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


class TestTraining:
    def test_none_without_gradients(self, monkeypatch):
        policy, asked = policy_with_loss(moe()), []
        forward = policy.model.model.forward

        def record(**inputs):
            asked.append(inputs["output_router_logits"])
            return forward(**inputs)

        monkeypatch.setattr(policy.model.model, "forward", record)
        with torch.no_grad():
            assert policy(BATCH).router is None
        assert policy(BATCH).router is not None
        assert asked == [False, True]

    def test_checkpointing(self):
        model = moe()
        policy = policy_with_loss(model)
        expected = gradients_of(model, policy(BATCH).router)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert worst_gradient_error(gradients_of(model, policy(BATCH).router), expected) < 1e-6
        assert any(float(grad.abs().max()) > 1e-3 for grad in expected.values())

    def test_adapters(self):
        model: Any = get_peft_model(moe(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        grads = gradients(model, policy_with_loss(model)(BATCH).router)
        assert grads
        assert all(float(grad.abs().max()) > 0 for grad in grads.values())

    def test_compiled(self):
        model = moe()
        policy = policy_with_loss(model)
        expected = policy(BATCH)
        policy.compile_backbone("eager")
        got = policy(BATCH)
        torch.testing.assert_close(got.router, expected.router, rtol=1e-5, atol=0)
        got.router.backward()
        assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-4
        with torch.no_grad():
            assert policy(BATCH).router is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lambda name="moe", **settings: save_folder(
        tmp_path_factory.mktemp(name), "mixtral", **{**MOES["mixtral"], **ASKED, **settings}
    )


class TestRuns:
    def test_it_is_added_by_its_coefficient(self, folder, train_tiny):
        runs = {c: train_tiny(f"run{c}", model=folder(router_aux_loss_coef=c)) for c in (0.0, 0.5)}
        assert "aux_loss" not in runs[0.0].metrics[0]
        first = runs[0.5].metrics[0]
        assert 1 < first["aux_loss"] < EXPERTS
        assert first["loss"] - 0.5 * first["aux_loss"] == FIRST_LOSS
        assert largest_difference(runs[0.0].weights(), runs[0.5].weights()) > 1e-4
        balance = runs[0.5].column("aux_loss")
        assert balance[-1] < balance[0]

    @pytest.mark.parametrize("packing", [True, False])
    def test_passes_weigh_by_their_rows(self, folder, train_tiny, monkeypatch, packing):
        from fused_dpo_engine.model.policy import Policy

        seen, forward = [], Policy.forward

        def record(self, batch):
            scores = forward(self, batch)
            if scores.router is not None:
                seen.append((float(scores.router), batch.num_slots - batch.num_padding))
            return scores

        monkeypatch.setattr(Policy, "forward", record)
        run = train_tiny(model=folder(), max_steps=1, packing=packing)
        assert len(seen) == run.metrics[0]["micro_batches"] > 1
        rows = sum(count for _, count in seen)
        expected = sum(value * count for value, count in seen) / rows
        assert run.metrics[0]["aux_loss"] == pytest.approx(expected, rel=1e-6)
        plain = sum(value for value, _ in seen) / len(seen)
        assert abs(plain - expected) > 1e-4, "control: a plain mean is another"

    def test_evaluation_leaves_it_out(self, folder, train_tiny, toy_data):
        run = train_tiny(model=folder(), eval_data=toy_data, learning_rate=1e-12)
        assert "eval_aux_loss" not in run.metrics[-1]
        assert run.summary.eval_before["eval_loss"] == FIRST_LOSS

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            ({}, "router: 0.5 times its load-balancing loss is added"),
            ({"output_router_logits": False}, "does not ask for it (output_router_logits is not true)"),
            ({"router_aux_loss_coef": 0.0}, "gives it no weight (router_aux_loss_coef is 0.0)"),
        ],
    )
    def test_the_run_says_what_becomes_of_it(self, folder, train, settings, line):
        assert line in train(model=folder(**settings), max_steps=1).message

    def test_other_models_say_nothing(self, tiny_llama, train):
        assert "router" not in train(max_steps=1).message

    def test_a_class_without_one(self, tmp_path):
        """DeepSeek V3 has experts and no such loss in transformers."""
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        saved = save_folder(tmp_path, "deepseek_v3", tokenizer=None, **experts, moe_intermediate_size=16)
        policy = build_policy(ModelOptions(str(saved), dtype="float32"), LoraOptions(), CPU)
        assert policy.router_loss is None
        assert "DeepseekV3ForCausalLM has none that is known here" in policy.notes[0]

    def test_layers_without_routers(self):
        """A family with experts, configured without."""
        loss, _ = router_loss_of(moe())
        assert loss is not None
        assert loss((), None) is None

    def test_a_backbone_that_keeps_them(self):
        """As GraniteMoE's did in transformers 5.17, whose own forward then has no such loss either."""
        loss, _ = router_loss_of(moe())
        assert loss is not None
        with pytest.raises(UnsupportedModelError, match="returns no router logits with this release of transformers"):
            loss(None, None)
