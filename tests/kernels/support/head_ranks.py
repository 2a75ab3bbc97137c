"""Gradients through a `FusedHead`, wrapped every way: torchrun ... -m tests.kernels.support.head_ranks FILE."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fused_dpo import FusedHead, LMHead, backbone_of, fused_token_logps

VOCABULARY = 213
"""Odd, so that the ranks' shards of the head differ in size."""
PAIRS = 4
Gradients = dict[str, Tensor]


def tiny(*, tied: bool = False) -> Any:
    """A llama of two layers; the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def adapted(*modules: str) -> Any:
    """The same with random adapters on some modules, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(*, scored: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
    """Ids and labels [8, 12], chosen before rejected; pairs that are not scored have no label."""
    ids = torch.randint(3, VOCABULARY, (2 * PAIRS, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    for pair in set(range(PAIRS)) - set(scored):
        labels[[pair, PAIRS + pair]] = -100
    return ids, labels


class Scoring(nn.Module):
    """Scores within its forward, as the module to wrap does."""

    def __init__(self, model: Any, head: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = FusedHead(model) if head is None else head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = backbone_of(self.model)(ids, use_cache=False).last_hidden_state
        return self.head(hidden, labels).logps


def backward(module: nn.Module, rows: tuple[Tensor, Tensor], pairs: list[int], pairs_a_rank: float) -> Tensor:
    """Add the gradients of some pairs' share of the mean over all pairs; returns their log-probs."""
    ids, labels = (values[pairs + [PAIRS + pair for pair in pairs]] for values in rows)
    logps = module(ids, labels)
    chosen, rejected = logps.sum(-1).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).sum() / pairs_a_rank).backward()
    return logps.detach()


def gradients(module: nn.Module) -> Gradients:
    """Those of a module, whole, by the names of the model in it."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            gradient: Any = parameter.grad
            if gradient is not None and hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.").removeprefix("model.")
            found[name] = torch.full((1,), torch.nan) if gradient is None else gradient.float().clone()
    return found


def alone(model: Any, rows: tuple[Tensor, Tensor]) -> Gradients:
    """Those of one process with all pairs, by the head's own logits."""
    ids, labels = rows
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    mask = labels[:, 1:] != -100
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask
    chosen, rejected = logps.sum(-1).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def halves_in_bfloat16(rows: tuple[Tensor, Tensor], ranks: int) -> Gradients:
    """Those of one process that runs each rank's pairs in bf16, and takes the mean in fp32."""
    total: Gradients = {}
    for rank in range(ranks):
        model = tiny()
        for parameter in model.parameters():  # not the buffers, which FSDP2 leaves in fp32 too
            parameter.data = parameter.data.bfloat16()
        module = Scoring(model)
        backward(module, rows, list(range(rank, PAIRS, ranks)), PAIRS / ranks)
        for name, gradient in gradients(module).items():
            total[name] = total.get(name, torch.zeros(())) + gradient / ranks
    return total


class Case:
    """One way to wrap a model on this rank, and the pairs that it has."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh("cpu", (self.ranks,))
        self.mine = list(range(self.rank, PAIRS, self.ranks))

    def run(self, module: nn.Module, rows: tuple[Tensor, Tensor]) -> Gradients:
        """Take the step of this rank's pairs."""
        backward(module, rows, self.mine, PAIRS / self.ranks)
        return gradients(module)

    def sharded(self, model: Any, head: str = "own", scoring: Scoring | None = None, **settings: Any) -> Any:
        """Shard by FSDP2, the head a unit of its own, one with the embeddings, or in the root."""
        scoring = scoring or Scoring(model)
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in causal.model.layers:
            fully_shard(layer, mesh=self.mesh, **settings)
        if head == "own":
            fully_shard(causal.lm_head, mesh=self.mesh, **settings)
        elif head == "with embeddings":
            both: Any = [causal.model.embed_tokens, causal.lm_head]
            fully_shard(both, mesh=self.mesh, **settings)
        return fully_shard(scoring, mesh=self.mesh, **settings)

    def flat(self, model: Any, head: str) -> nn.Module:
        """Wrap by FSDP1, the head in a unit of its own or in the root."""
        layers = {*model.model.layers, *([model.lm_head] if head == "own" else ())}
        policy = CustomPolicy(lambda module: module in layers)
        return FullyShardedDataParallel(
            Scoring(model), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )

    def run_flat(self, head: str, rows: tuple[Tensor, Tensor]) -> Gradients:
        module = self.flat(tiny(), head)
        backward(module, rows, self.mine, PAIRS / self.ranks)
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            return gradients(module)

    def accumulated(self, rows: tuple[Tensor, Tensor]) -> Gradients:
        """A pair at a time, reduced at the last one."""
        module = self.sharded(tiny())
        for pair in self.mine:
            module.set_requires_gradient_sync(pair == self.mine[-1])
            backward(module, rows, [pair], PAIRS / self.ranks)
        return gradients(module)

    def after_others(self, rows: tuple[Tensor, Tensor]) -> Gradients:
        """The layer called for its logits and without gradients first, and the step taken twice."""
        model = tiny()
        module = self.sharded(model)
        ids, labels = rows
        with torch.no_grad():
            module(ids[:2], labels[:2])
        for _ in range(2):
            module.zero_grad()
            backward(module, rows, self.mine, PAIRS / self.ranks)
        return gradients(module)


def gathered_without_reduction(model: Any) -> Callable[..., Any]:
    """The head as `full_tensor()` gives it."""
    return lambda hidden, labels: fused_token_logps(hidden, LMHead(model.lm_head.weight.full_tensor()), labels)


def cases() -> Iterator[tuple[str, Gradients, Gradients]]:
    """Name, what the ranks got, and what one process gets."""
    case, rows = Case(), batch()
    truth, tied = alone(tiny(), rows), alone(tiny(tied=True), rows)
    yield "ddp", case.run(DistributedDataParallel(Scoring(tiny())), rows), truth
    yield "fsdp2 own", case.run(case.sharded(tiny()), rows), truth
    yield "fsdp2 own, kept whole", case.run(case.sharded(tiny(), reshard_after_forward=False), rows), truth
    yield "fsdp2 own, resharded", case.run(case.sharded(tiny(), reshard_after_forward=True), rows), truth
    yield "fsdp2 root", case.run(case.sharded(tiny(), "root"), rows), truth
    yield "fsdp2 tied, root", case.run(case.sharded(tiny(tied=True), "root"), rows), tied
    yield "fsdp2 tied, with embeddings", case.run(case.sharded(tiny(tied=True), "with embeddings"), rows), tied
    for modules in (("lm_head", "q_proj"), ("q_proj",)):
        got = case.run(case.sharded(adapted(*modules)), rows)
        yield f"fsdp2 adapters on {modules[0]}", got, alone(adapted(*modules), rows)
    some = batch(scored=tuple(range(0, PAIRS, case.ranks)))
    yield "fsdp2 own, a rank with nothing", case.run(case.sharded(tiny()), some), alone(tiny(), some)
    yield "ddp, a rank with nothing", case.run(DistributedDataParallel(Scoring(tiny())), some), alone(tiny(), some)
    yield "fsdp2 own, accumulated", case.accumulated(rows), truth
    yield "fsdp2 own, after others", case.after_others(rows), truth
    yield "fsdp1 own", case.run_flat("own", rows), truth
    yield "fsdp1 root", case.run_flat("root", rows), truth
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for place in ("own", "root"):
        got = case.run(case.sharded(tiny(), place, mp_policy=mixed), rows)
        yield f"fsdp2 {place}, bf16", got, halves_in_bfloat16(rows, case.ranks)
    model = tiny()
    scoring = Scoring(model, gathered_without_reduction(model))
    yield "control: full_tensor()", case.run(case.sharded(model, scoring=scoring), rows), truth
    module: Any = DistributedDataParallel(Scoring(tiny()))
    backward(module.module, rows, case.mine, PAIRS / case.ranks)
    yield "control: outside", gradients(module), truth


@contextmanager
def ranks() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def main() -> None:
    """Write, of each rank to FILE.RANK, what every case got and should have got."""
    with ranks():
        made = {name: (got, expected) for name, got, expected in cases()}
        torch.save(made, f"{sys.argv[1]}.{dist.get_rank()}")


if __name__ == "__main__":
    main()
