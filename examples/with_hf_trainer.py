"""DPO by the Trainer of transformers: python -m examples.with_hf_trainer MODEL FOLDER."""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from examples.toy_pairs import collate, toy_pairs
from fused_dpo import DPOLoss
from fused_dpo.integrations import add_scoring


class FusedDPOTrainer(Trainer):
    """Scores policy and reference by calling them, so that mixed precision, DDP and FSDP are at work."""

    def __init__(self, model, reference, **settings):
        for each in (model, reference):
            add_scoring(each)
        super().__init__(model, data_collator=collate, **settings)
        self.model_accepts_loss_kwargs = False  # a mean over pairs: accumulated steps are divided by their number
        self.reference = self.accelerator.prepare_model(reference.eval().requires_grad_(False), evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Take the loss of a batch whose first half is chosen."""
        inputs["fused_dpo_labels"] = inputs.pop("labels")
        reference = self.reference(**inputs).tokens.logps.sum(1).chunk(2)
        loss = DPOLoss(beta=0.1)(*model(**inputs).tokens.logps.sum(1).chunk(2), *reference).loss
        return (loss, {}) if return_outputs else loss


def main(model: str, folder: str, **settings) -> Trainer:
    """Train on toy pairs; checkpoints are those of the model, as it is."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype="float32") for _ in range(2))
    arguments = TrainingArguments(folder, remove_unused_columns=False, max_steps=3, **settings)
    trainer = FusedDPOTrainer(policy, reference, args=arguments, train_dataset=toy_pairs(policy.config.vocab_size))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
