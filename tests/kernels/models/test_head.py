"""`head_of` on tiny random Hugging Face models: the fused head against the model's own logits, or refused by name."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dpo import LMHead, LowRankAdapter, fused_dpo_logps, head_of
from tests.kernels.support.problems import IGNORE, assert_close, present

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma2 without softcap": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 1.5},
    "granite": {"logits_scaling": 8.0},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64},
    "phi": {},  # has a bias on the head
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 32, "block_types": ["attention"]},
    "mpt": {"logit_scale": 0.25, "d_model": 32, "n_heads": 2, "n_layers": 1},  # transformers' MPT ignores the scale
    "xlstm": {"output_logit_soft_cap": 2.0, "num_heads": 2},
    "minicpm3": {"dim_model_base": 8},  # divides by hidden_size / dim_model_base
    "hyperclovax": {"logits_scaling": 0.3},  # multiplies, where granite divides
    "nanochat": {"final_logit_softcapping": 3.0},
}
REFUSABLE = {"recurrent_gemma", "mpt", "xlstm", "minicpm3", "falcon_h1", "hyperclovax", "nanochat"}
"""Models whose head may be refused by name, as long as no number comes out that is not the model's."""


def causal_lm(name: str = "llama", **settings: Any) -> nn.Module:
    """A random model in float64, in eval mode, with logits of a few nats."""
    model_type = name.split(" ")[0]
    settings = {**MODELS.get(name, {}), **settings}
    sizes = SIZES if model_type not in ("gpt2", "mpt") else {"vocab_size": VOCAB}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 or parameter.shape == (VOCAB,):
            nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels [3, 11], a prompt and some padding ignored."""
    tokens = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :4] = labels[1, 7:] = IGNORE
    return tokens, labels


def logps_by_logits(model: nn.Module) -> Tensor:
    """From the model's own logits, in their dtype."""
    tokens, labels = batch()
    logits = model(input_ids=tokens, use_cache=False).logits
    picked = logits[:, :-1].double().log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (picked * (labels[:, 1:] != IGNORE)).sum(-1)


def hidden_states_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Last hidden states after the final norm, from the body below the head."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    return causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def logps_by_head(model: nn.Module) -> Tensor:
    tokens, labels = batch()
    return fused_dpo_logps(hidden_states_of(model, tokens), head_of(model), labels)


def assert_same_model(model: nn.Module, *, may_refuse: bool = False) -> None:
    """The fused head says what the model says; or, where that is fine too, it refuses by name."""
    try:
        head_of(model)
    except NotImplementedError:
        if may_refuse:
            return
        raise
    # 1e-6: both sides take the same hidden states (fp32 norms inside the body cancel out) and multiply in float64; some
    # models round their logits to fp32.
    expected = logps_by_logits(model).detach()
    assert expected.std() > 0.1  # not a model that says the same everywhere
    assert_close("logps", logps_by_head(model), expected, 1e-6)


def build_or_skip(name: str) -> nn.Module:
    try:
        return causal_lm(name)
    except (ValueError, KeyError, ImportError) as error:
        if name not in REFUSABLE:
            raise
        pytest.skip(f"this transformers cannot build a tiny {name}: {str(error)[:80]}")


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_the_models(name: str) -> None:
    model = build_or_skip(name)
    assert_same_model(model, may_refuse=name in REFUSABLE)


def test_what_is_read() -> None:
    """Each setting by itself, against the numbers in the configurations above."""
    heads = {name: head_of(causal_lm(name)) for name in ("llama", "gemma2", "cohere", "granite", "phi")}
    assert heads["gemma2"].softcap == 3.0
    assert heads["cohere"].logit_scale == 0.25
    assert heads["granite"].logit_scale == 1 / 8
    assert heads["phi"].bias is not None
    plain = heads["llama"]
    assert (plain.bias, plain.logit_scale, plain.softcap, plain.temperature, plain.lora) == (None, 1.0, None, 1.0, None)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "camembert", "roformer"])
def test_layers_before_the_weight_are_refused(name: str, adapter: bool) -> None:
    """These models' weight multiplies what a dense layer and a norm make of the hidden states."""
    model: Any = causal_lm(name, is_decoder=True)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(NotImplementedError, match=r"changes the hidden states in '.*' before the head's weight"):
        head_of(model)


def test_a_weight_inside_a_part_of_its_own() -> None:
    """With nothing beside it, it is a head like any other."""
    model: Any = causal_lm("bert-generation", is_decoder=True)
    assert model.get_output_embeddings() is model.lm_head.decoder
    assert_same_model(model)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_control_the_setting_matters(name: str) -> None:
    """Negative control: the bare weight gives another number for these models."""
    model = causal_lm(name)
    tokens, labels = batch()
    bare = fused_dpo_logps(hidden_states_of(model, tokens), head_of(model).weight, labels)
    assert (bare - logps_by_logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_gradients_arrive_in_the_parameters(name: str) -> None:
    """All gradients of the model, tied or not, as from its own logits."""
    model = causal_lm(name)
    head = head_of(model)
    assert any(head.weight is parameter for parameter in model.parameters())
    gradients = []
    for logps in (logps_by_head, logps_by_logits):
        model.zero_grad()
        (logps(model) * torch.tensor([1.0, -0.5, 2.0])).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    for parameter, grad in expected.items():
        # 1e-6: llama's norms compute in fp32 even in a float64 model.
        assert_close(parameter, ours[parameter], grad, 1e-6)


def with_adapter(config: Any, name: str = "llama", **settings: Any) -> Any:
    """A peft model whose adapter does something: everything trainable is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(causal_lm(name, **settings), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def lora(*modules: str, **settings: Any) -> Any:
    return peft.LoraConfig(target_modules=list(modules or ("lm_head",)), **{"r": 4, "lora_alpha": 6, **settings})


@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"r": 1}, {"lora_dropout": 0.5}], ids=str)
def test_lora_on_the_head(settings: dict, name: str) -> None:
    model = with_adapter(lora("lm_head", "q_proj", **settings), name)  # in eval mode, where dropout is off
    head = head_of(model)
    assert isinstance(head.lora, LowRankAdapter)
    assert_same_model(model)
    expected = logps_by_logits(model)
    with model.disable_adapter():
        assert head_of(model).lora is None
        assert_same_model(model)
        assert (logps_by_logits(model) - expected).abs().max() > 0.1  # the adapter does something
    assert_same_model(model)


def test_lora_elsewhere() -> None:
    model = with_adapter(lora("q_proj"))
    assert head_of(model).lora is None
    assert_same_model(model)


def test_merged_adapter() -> None:
    model = with_adapter(lora())
    expected = logps_by_logits(model)
    model.merge_adapter()
    assert head_of(model).lora is None
    assert_same_model(model)
    assert_close("merged", logps_by_head(model), expected, 1e-12)  # float64: the sum of two matrices, then the product
    model.unmerge_adapter()
    assert head_of(model).lora is not None
    assert_same_model(model)
    assert_same_model(model.merge_and_unload())


def test_one_of_several_adapters() -> None:
    model = with_adapter(lora())
    model.add_adapter("second", lora(r=2))
    model.double()
    first = logps_by_head(model)
    for parameter in (m.weight for n, m in model.named_modules() if "lora_B.second" in n):
        nn.init.normal_(parameter)
    model.set_adapter("second")
    assert_same_model(model)
    assert (logps_by_head(model) - first).abs().max() > 0.1
    model.set_adapter("default")
    assert_same_model(model)


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_head_in_modules_to_save(name: str) -> None:
    """A full copy of the head that is trained instead of the original."""
    model = with_adapter(lora("q_proj", modules_to_save=["lm_head"]), name)
    wrapper = model.base_model.model.lm_head
    assert_same_model(model)
    expected = logps_by_logits(model)
    assert head_of(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head_of(model).weight is wrapper.original_module.weight
        assert_same_model(model)
        assert (logps_by_logits(model) - expected).abs().max() > 0.1


def test_gradients_of_the_adapter() -> None:
    """The base weight is frozen: gradients go to the adapter alone, as from the model's own logits."""
    model = with_adapter(lora())
    gradients = []
    for logps in (logps_by_head, logps_by_logits):
        model.zero_grad()
        logps(model).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert [name.split(".")[-3] for name in gradients[0]] == ["lora_A", "lora_B"]
    for name, grad in gradients[1].items():
        assert_close(name, gradients[0][name], grad, 1e-12)  # float64 from the hidden states on, and no norm behind


OTHER_ADAPTERS: dict[str, Callable[[], Any]] = {
    "IA3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["lm_head"], r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=["lm_head"], r=4),
    "OFT": lambda: peft.OFTConfig(target_modules=["lm_head"], oft_block_size=4),
    "VeRA": lambda: peft.VeraConfig(target_modules=["lm_head"], r=4),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=["lm_head"], n_frequency=10),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["lm_head"], init_r=4, target_r=2, total_step=10),
}


@pytest.mark.parametrize("config", OTHER_ADAPTERS.values(), ids=OTHER_ADAPTERS.keys())
def test_other_adapters_are_right_or_refused(config: Callable[[], Any]) -> None:
    """An adapter on the head that the kernels do not know must never be left out silently."""
    model = with_adapter(config())
    with model.disable_adapter():
        without = logps_by_logits(model)
    assert (logps_by_logits(model) - without).abs().max() > 1e-3  # the adapter does something
    assert_same_model(model, may_refuse=True)


def test_trained_tokens_of_a_tied_head_are_right_or_refused() -> None:
    """peft's trainable tokens replace rows of the tied matrix, in the embedding and in the head."""
    model = with_adapter(peft.TrainableTokensConfig(token_indices=batch()[0][0, :4].tolist()), "llama tied")
    assert_same_model(model, may_refuse=True)


@pytest.mark.parametrize(
    ("settings", "train", "message"),
    [
        ({"use_dora": True}, False, r"adapter 'default' on the head is not plain LoRA \(a variant such as DoRA"),
        ({"lora_bias": True}, False, r"adapter 'default' has a bias on lora_B; train it with lora_bias=False"),
        ({"lora_dropout": 0.1}, True, r"adapter 'default' has dropout 0.1 on the head.*set lora_dropout=0"),
    ],
    ids=["DoRA", "bias", "dropout in training"],
)
def test_lora_that_is_refused(settings: dict, train: bool, message: str) -> None:
    model = with_adapter(lora(**settings)).train(train)
    with pytest.raises(NotImplementedError, match=message):
        head_of(model)


def test_several_active_adapters_are_refused() -> None:
    model = with_adapter(lora())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(NotImplementedError, match=r"has 2 active adapters \['default', 'second'\]; merge them"):
        head_of(model)


def test_a_setting_that_the_class_does_not_apply() -> None:
    """The forward decides, not the configuration: Llama's knows no scale and no softcap."""
    model: Any = causal_lm()
    model.config.logits_scaling, model.config.final_logit_softcapping = 2.0, 3.0
    assert_same_model(model)


def test_a_setting_that_changes_after_the_first_reading() -> None:
    model: Any = causal_lm("gemma2")
    assert head_of(model).softcap == 3.0
    model.config.final_logit_softcapping = None
    assert head_of(model).softcap is None
    assert_same_model(model)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 4), SimpleNamespace(get_output_embeddings=lambda: None)],
    ids=["not a model", "no head"],
)
def test_models_without_a_head(model: Any) -> None:
    name = type(model).__name__
    with pytest.raises(TypeError, match=rf"{name} has no output embeddings .*; pass the weight \[V, D\]"):
        head_of(model)


def test_body_without_a_head() -> None:
    with pytest.raises(TypeError, match="LlamaModel has no output embeddings"):
        head_of(causal_lm().base_model)  # pyright: ignore[reportArgumentType]


def test_a_model_of_ones_own() -> None:
    """No configuration and no transformers: `get_output_embeddings` is all it takes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 7)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    model = Model()
    head = head_of(model)
    assert isinstance(head, LMHead)
    assert head.weight is model.out.weight
    assert present(head.bias) is model.out.bias
