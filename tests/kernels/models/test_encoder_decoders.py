"""`head_of` on tiny random encoder-decoders: factors and biases as the model's own forward applies them, or refused."""

from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo import fused_dpo_logps, get_batch_logps, head_of
from tests.kernels.support.problems import present

transformers = pytest.importorskip("transformers")

VOCAB = 40
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
BART = {
    **{"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
}
GEMMA = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "final_logit_softcapping": 2.0, "sliding_window": 8},
}
UNTIED = {"tie_word_embeddings": False}
FSMT = {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}

SCALED = ("T5", "LongT5", "UMT5", "SwitchTransformers")
BIASED = ("Bart", "MBart", "Pegasus", "Blenderbot", "BlenderbotSmall", "BigBirdPegasus", "PLBart", "LED", "Mvp")
PLAIN = ("MT5", "M2M100", "PegasusX")


def build(family: str, **settings: Any) -> Any:
    """A random model in eval mode; everything that could be added to its logits is random too."""
    if family == "Marian":
        config = transformers.MarianConfig(**BART, decoder_start_token_id=1)
        cls = transformers.MarianMTModel
    elif family == "T5Gemma":
        part = transformers.T5GemmaModuleConfig(**GEMMA)
        config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=VOCAB, **settings)
        cls = transformers.T5GemmaForConditionalGeneration
    else:
        sizes = T5 if "T5" in family or family == "SwitchTransformers" else BART
        config = getattr(transformers, f"{family}Config")(**sizes, **settings)
        cls = getattr(transformers, f"{family}ForConditionalGeneration")
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (tensor.ndim == 2 or "bias" in name):
            tensor.data.normal_(std=1.0 if "bias" in name else 0.3)
    return model


def worst_logp(model: nn.Module, head: Any) -> float:
    """Largest difference in nat from the log-probs of the model's own logits."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
        got = fused_dpo_logps(out.decoder_hidden_states[-1], head, ids)
        expected = get_batch_logps(out.logits, ids)
    assert expected.std() > 0.1  # not a model that says the same everywhere
    return float((got - expected).abs().max())


@pytest.mark.parametrize("family", [*SCALED, *BIASED, *PLAIN, "Marian", "T5Gemma"])
@pytest.mark.parametrize("settings", [{}, UNTIED], ids=["tied", "untied"])
def test_logps_are_the_models(family: str, settings: dict[str, Any]) -> None:
    if family in ("Marian", "LED") and settings:
        pytest.skip("always tied")
    model = build(family, **settings)
    # 1e-4 nat: both sides multiply the same fp32 hidden states by the same weight, and sum 6 tokens of up to 30 nat.
    assert worst_logp(model, head_of(model)) < 1e-4


@pytest.mark.parametrize("family", ["T5", "Bart", "Marian", "T5Gemma"])
def test_control_what_is_read_matters(family: str) -> None:
    """Negative control: the bare weight gives another number."""
    model = build(family)
    assert worst_logp(model, head_of(model).weight) > 0.1


def test_the_forward_decides_by_class_and_setting() -> None:
    assert head_of(build("T5")).logit_scale == 32**-0.5
    assert head_of(build("T5", **UNTIED)).logit_scale == 1.0
    assert head_of(build("MT5")).logit_scale == 1.0  # a T5 whose forward does not scale
    model = build("Bart")
    assert torch.equal(present(head_of(model).bias), model.final_logits_bias[0])


class Decoder(nn.Module):
    """A model of one's own that says how it scales in its forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(is_encoder_decoder=True, d_model=16)
        self.head = nn.Linear(16, VOCAB)
        self.warm = True

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Scaling(Decoder):
    def forward(self, hidden):
        if self.warm:
            hidden = (self.config.d_model**-0.5) * hidden
        return self.head(hidden)


class ScalingAtTimes(Decoder):
    def forward(self, hidden):
        if len(hidden) > 2:
            hidden = hidden * (self.config.d_model**-0.5)
        return self.head(hidden)


def test_own_bias_below_a_factor() -> None:
    """The factor is on the hidden states, so the head's own bias is not multiplied by it."""
    model, hidden = Scaling(), torch.randn(1, 5, 16)
    labels = torch.arange(5)[None]
    got = fused_dpo_logps(hidden, head_of(model), labels)
    torch.testing.assert_close(got, get_batch_logps(model(hidden), labels), rtol=1e-5, atol=0)
    model.warm = False
    assert head_of(model).logit_scale == 1.0


def test_conditions_that_are_no_setting_are_refused() -> None:
    with pytest.raises(
        NotImplementedError,
        match=r"ScalingAtTimes scales .* by config\.d_model under a condition",
    ):
        head_of(ScalingAtTimes())


def test_classes_without_source_are_refused() -> None:
    namespace: dict[str, Any] = {"Decoder": Decoder}
    exec("class Sourceless(Decoder):\n    def forward(self, hidden):\n        return hidden", namespace)
    with pytest.raises(NotImplementedError, match=r"the source of Sourceless\.forward is not there"):
        head_of(namespace["Sourceless"]())


def test_numbers_for_each_token_that_nobody_knows_are_refused() -> None:
    model = Scaling()
    model.register_buffer("token_temperature", torch.ones(VOCAB))
    with pytest.raises(NotImplementedError, match=r"Scaling\.token_temperature has a number for each token"):
        head_of(model)


@pytest.mark.parametrize(
    ("family", "message"),
    [("ProphetNet", "a stream of its own"), ("FSMT", "names its input embeddings as the head")],
)
def test_logits_from_elsewhere_are_refused(family: str, message: str) -> None:
    config = getattr(transformers, f"{family}Config")
    names = set(config().to_dict())
    sizes = {**BART, "hidden_size": 32, **FSMT, "num_encoder_layers": 1, "num_decoder_layers": 1}
    sizes |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = config(**{name: value for name, value in sizes.items() if name in names})
    with pytest.raises(NotImplementedError, match=message):
        head_of(getattr(transformers, f"{family}ForConditionalGeneration")(config))


def test_a_layer_between_two_parts_of_the_head_is_refused() -> None:
    """ModernBERT's decoder calls its head on the output of another part."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    special = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)
    config = transformers.ModernBertDecoderConfig(**sizes, num_attention_heads=2, **special)
    with pytest.raises(NotImplementedError, match="changes the hidden states in 'lm_head'"):
        head_of(transformers.ModernBertDecoderForCausalLM(config))


def test_a_language_model_inside_another() -> None:
    """BLIP-2 holds an encoder-decoder, whose factor counts."""
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**part, "image_size": 8, "patch_size": 4},
        qformer_config={**part, "vocab_size": 8, "encoder_hidden_size": 16},
        text_config=transformers.T5Config(**T5).to_dict(),
        num_query_tokens=2,
    )
    assert head_of(transformers.Blip2ForConditionalGeneration(config)).logit_scale == 32**-0.5
