"""Tiny random models of many families, and the table of how their heads are read.

python -m tests.kernels.support.families     # writes the table into docs/drop-in.md
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from fused_dpo import check_head

DOCUMENT = Path(__file__).parents[3] / "docs" / "drop-in.md"
BEGIN, END = "<!-- heads: begin -->", "<!-- heads: end -->"
VOCAB = 96

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
BART = {
    **{"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
CAPPED = {"final_logit_softcapping": 3.0}


class Family(NamedTuple):
    """One model of a family, by its class and the settings that make it tiny."""

    name: str
    cls: str
    config: str
    settings: dict[str, Any]


def _causal(name: str, prefix: str, **settings: Any) -> Family:
    return Family(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**TEXT, **settings})


def _speaking(name: str, prefix: str, text: str, vision: str, sizes: dict[str, Any], **settings: Any) -> Family:
    """A multimodal model: its own configuration around one of a text model and one of what it sees."""
    parts = {"text_config": {"model_type": text, **TEXT, **sizes}, "vision_config": {"model_type": vision, **VISION}}
    return Family(name, f"{prefix}ForConditionalGeneration", f"{prefix}Config", {**parts, **settings})


def _translating(name: str, prefix: str, sizes: dict[str, Any], **settings: Any) -> Family:
    return Family(name, f"{prefix}ForConditionalGeneration", f"{prefix}Config", {**sizes, **settings})


FAMILIES = (
    _causal("llama", "Llama"),
    _causal("llama, tied", "Llama", tie_word_embeddings=True),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3"),
    _causal("qwen3_moe", "Qwen3Moe", **EXPERTS),
    _causal("mistral", "Mistral"),
    _causal("mixtral", "Mixtral", **EXPERTS),
    _causal("gemma", "Gemma"),
    _causal("gemma2", "Gemma2", **CAPPED),
    _causal("gemma3_text", "Gemma3", **CAPPED)._replace(config="Gemma3TextConfig"),
    _causal("gemma4_text", "Gemma4", **CAPPED)._replace(config="Gemma4TextConfig"),
    _causal("vaultgemma", "VaultGemma", **CAPPED),
    _causal("recurrent_gemma", "RecurrentGemma", logits_soft_cap=2.0, lru_width=32, block_types=["attention"]),
    _causal("nanochat", "NanoChat", **CAPPED),
    _causal("cohere", "Cohere", logit_scale=0.25),
    _causal("cohere2", "Cohere2", logit_scale=1.5),
    _causal("granite", "Granite", logits_scaling=8.0),
    _causal("granitemoe", "GraniteMoe", logits_scaling=4.0, **EXPERTS),
    _causal("hyperclovax", "HyperCLOVAX", logits_scaling=0.3),
    _causal("minicpm3", "MiniCPM3", dim_model_base=8, **LATENT),
    _causal("falcon_h1", "FalconH1", lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16),
    _causal("phi", "Phi"),
    _causal("phi3", "Phi3"),
    _causal("olmo2", "Olmo2"),
    _causal("olmoe", "Olmoe", **EXPERTS),
    _causal("stablelm", "StableLm"),
    _causal("starcoder2", "Starcoder2"),
    _causal("glm", "Glm"),
    _causal("glm4", "Glm4"),
    _causal("nemotron", "Nemotron"),
    _causal("smollm3", "SmolLM3"),
    _causal("gpt_oss", "GptOss", **EXPERTS),
    _causal("deepseek_v3", "DeepseekV3", first_k_dense_replace=1, **{**LATENT, "head_dim": 8}),
    _causal("llama4_text", "Llama4", **EXPERTS)._replace(config="Llama4TextConfig"),
    Family("falcon", "FalconForCausalLM", "FalconConfig", {k: v for k, v in TEXT.items() if k != "head_dim"}),
    _causal("gpt_neox", "GPTNeoX"),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT),
    Family("gptj", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}),
    Family("codegen", "CodeGenForCausalLM", "CodeGenConfig", {**GPT, "n_head": 4, "rotary_dim": 8}),
    Family("opt", "OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    Family("bloom", "BloomForCausalLM", "BloomConfig", {**TEXT, "n_head": 2, "n_layer": 1}),
    Family(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 2, "n_layers": 1} | {"logit_scale": 0.25},
    ),
    Family(
        "mamba", "MambaForCausalLM", "MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1}
    ),
    _causal("inkling", "Inkling", unpadded_vocab_size=80, logits_mup_width_multiplier=4.0)._replace(
        config="InklingTextConfig"
    ),
    _causal("inkling2", "Inkling2", unpadded_vocab_size=80, **CAPPED)._replace(config="Inkling2TextConfig"),
    _speaking("llava", "Llava", "llama", "clip_vision_model", {}),
    _speaking("mistral3", "Mistral3", "mistral", "pixtral", {}),
    _speaking("paligemma", "PaliGemma", "gemma2", "siglip_vision_model", CAPPED),
    _speaking("gemma3", "Gemma3", "gemma3_text", "siglip_vision_model", CAPPED, mm_tokens_per_image=4),
    _speaking("cohere2_vision", "Cohere2Vision", "cohere2", "siglip_vision_model", {"logit_scale": 0.25}),
    _speaking("aya_vision", "AyaVision", "cohere2", "siglip_vision_model", {"logit_scale": 0.25}),
    _speaking("llama4", "Llama4", "llama4_text", "llama4_vision_model", EXPERTS),
    _speaking("qwen2_vl", "Qwen2VL", "qwen2_vl_text", "qwen2_vl", {"rope_parameters": MROPE}),
    Family(
        "granite_speech",
        "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechConfig",
        {
            "text_config": {"model_type": "granite", **TEXT, "logits_scaling": 8.0},
            "encoder_config": {"num_layers": 1, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "output_dim": 8},
            "projector_config": {
                **{"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1},
                **{"num_attention_heads": 2, "intermediate_size": 32, "encoder_hidden_size": 32},
            },
            "has_lora_adapter": False,
        },
    ),
    _translating("t5, tied", "T5", T5),
    _translating("t5, untied", "T5", T5, tie_word_embeddings=False),
    _translating("mt5", "MT5", T5),
    _translating("umt5", "UMT5", T5),
    _translating("bart", "Bart", BART),
    _translating("mbart", "MBart", BART),
    _translating("pegasus", "Pegasus", BART),
    Family("marian", "MarianMTModel", "MarianConfig", {**BART, "decoder_start_token_id": 1}),
    _translating(
        "prophetnet",
        "ProphetNet",
        {
            **{"vocab_size": VOCAB, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1},
            **{"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2},
        },
    ),
    _translating("fsmt", "FSMT", BART, langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
    Family("bert", "BertLMHeadModel", "BertConfig", {**TEXT, "is_decoder": True}),
    _causal("roberta", "Roberta", is_decoder=True),
    _causal("electra", "Electra", is_decoder=True),
    _causal("modernbert-decoder", "ModernBertDecoder", cls_token_id=1, sep_token_id=2),
)


def build(family: Family) -> nn.Module:
    """A random model in fp32 and eval mode, with logits of several nats, so that scales and softcaps show.

    Raises:
        AttributeError: this release of transformers does not have the family.
    """
    config = getattr(transformers, family.config)(**family.settings)
    torch.manual_seed(0)
    model = getattr(transformers, family.cls)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (tensor.ndim == 2 or name.endswith("bias")):
            tensor.data.normal_(std=0.3, generator=generator)
    return model


def tokens() -> torch.Tensor:
    """[8], of the first 80, which every vocabulary here has; 3 and below are special."""
    return torch.randint(4, 80, (8,), generator=torch.Generator().manual_seed(2))


def read(family: Family) -> tuple[float | None, str]:
    """Give the error in nats, or None and why the head is refused."""
    try:
        return check_head(build(family), tokens()), ""
    except NotImplementedError as error:
        return None, str(error).split(";")[0]


def row(family: Family) -> str:
    """Write one row of the table."""
    try:
        error, reason = read(family)
    except AttributeError as absent:
        return f"| {family.name} | `{family.cls}` | not in transformers {transformers.__version__}: {absent} |"
    return f"| {family.name} | `{family.cls}` | {f'{error:.0e}' if error is not None else f'refused: {reason}'} |"


def table() -> str:
    """Write the table of all families."""
    return "\n".join(["| family | class | error (nat) |", "|---|---|---|", *map(row, FAMILIES)])


def main() -> None:
    """Write the table into the document."""
    warnings.simplefilter("ignore")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def build_or_skip(family: Family) -> nn.Module:
    try:
        return build(family)
    except AttributeError as absent:
        pytest.skip(f"this transformers does not have {family.cls}: {absent}")


if __name__ == "__main__":
    main()
