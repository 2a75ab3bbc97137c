"""The function alone: a preference step on a model of plain torch, which needs no transformers and no GPU.

python -m examples.minimal
"""

import copy

import torch
from torch import Tensor, nn

from fused_dpo import DPOLoss, fused_dpo_logps

VOCABULARY, WIDTH = 32_000, 64


class Model(nn.Module):
    """A recurrent language model; any other that gives hidden states and has a head will do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.backbone = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Score sequences [B, S]: log-probs [B] of the tokens whose label is not -100."""
        hidden, _ = self.backbone(self.embed(tokens))
        return fused_dpo_logps(hidden, self.head.weight, labels)


def main() -> list[float]:
    """Train for a few steps, print the loss of each, and return them."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, 48))  # four chosen responses, then the four rejected ones
    tokens[4:, :16] = tokens[:4, :16]  # on the same prompts
    labels = tokens.clone()
    labels[:, :16] = -100  # a prompt is not scored

    policy = Model()
    reference = copy.deepcopy(policy).requires_grad_(False)  # the policy before its first update
    with torch.no_grad():
        ref_chosen, ref_rejected = reference(tokens, labels).chunk(2)
    loss_of, optimizer = DPOLoss(beta=0.1), torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses: list[float] = []
    for step in range(5):
        chosen, rejected = policy(tokens, labels).chunk(2)
        output = loss_of(chosen, rejected, ref_chosen, ref_rejected)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}, margin {output.metrics['rewards/margins']:.4f}")
    return losses


if __name__ == "__main__":
    main()
