"""DPO in a loop of one's own by Accelerate: `accelerate launch -m examples.with_accelerate MODEL FOLDER`."""

import copy
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from examples.toy_pairs import collate, toy_pairs
from fused_dpo import DPOLoss
from fused_dpo.integrations import LogpsModel


def main(model: str, folder: str) -> list[float]:
    """Train on toy pairs, save the model, and return the loss of each step."""
    accelerator, losses = Accelerator(), []
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    reference = LogpsModel(copy.deepcopy(base).eval().requires_grad_(False))
    policy = LogpsModel(base)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    pairs = toy_pairs(base.config.vocab_size, count=6)
    batches = DataLoader(pairs, batch_size=2, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    policy, optimizer, batches = accelerator.prepare(policy, optimizer, batches)
    reference = accelerator.prepare_model(reference, evaluation_mode=True)
    for batch in batches:
        output = DPOLoss(beta=0.1)(*policy(**batch).chunk(2), *reference(**batch).chunk(2))
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        accelerator.print(f"loss {losses[-1]:.4f}, margin {output.metrics['rewards/margins']:.4f}")
    accelerator.unwrap_model(policy).model.save_pretrained(folder)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
