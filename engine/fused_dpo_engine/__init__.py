"""A small DPO trainer around `fused_dpo`: preference pairs in, a trained Hugging Face model out."""
