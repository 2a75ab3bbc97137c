"""One process among others, without any others: what it counts itself as, and how it holds the model."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.distributed.gradients import clip_gradients
from fused_dpo_engine.distributed.ranks import Ranks, join_ranks
from fused_dpo_engine.distributed.strategy import Strategy, choose_strategy
from fused_dpo_engine.errors import OtherRankFailedError, UserError
from fused_dpo_engine.model.layers import decoder_layers
from fused_dpo_engine.reference.scoring import score_reference
from tests.engine.support.policies import BATCH, PAIRS, policy_of
from tests.engine.support.toys import options, tiny_model

ALONE = Ranks()


class TestRanks:
    def test_one_process_needs_no_process_group(self):
        ranks = join_ranks(1, Ranks.timeout, alone=False)
        assert ranks == ALONE
        assert not torch.distributed.is_initialized()
        assert (ranks.is_main, ranks.data_rank, ranks.data_size) == (True, 0, 1)
        ranks.barrier()
        assert ranks.gather_objects("x") == ["x"]
        assert ranks.use(torch.device("cpu")) == (ranks, torch.device("cpu"))

    @pytest.mark.parametrize(
        ("rank", "size", "tensor_parallel", "expected"),
        [(5, 8, 1, (5, 8)), (5, 8, 2, (2, 4)), (4, 8, 2, (2, 4)), (5, 8, 8, (0, 1))],
    )
    def test_neighbours_share_pairs(self, rank, size, tensor_parallel, expected):
        ranks = Ranks(rank, size, tensor_parallel=tensor_parallel)
        assert (ranks.data_rank, ranks.data_size) == expected

    def test_groups_that_do_not_come_out_even(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "6")
        with pytest.raises(UserError, match="--tensor-parallel 4 does not divide the 6 processes"):
            join_ranks(4, Ranks.timeout, alone=False)
        monkeypatch.setenv("RANK", "1")  # says nothing, as the first has said it
        with pytest.raises(OtherRankFailedError):
            join_ranks(4, Ranks.timeout, alone=False)

    def test_fewer_devices_than_processes(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        with pytest.raises(UserError, match="process 3 of this machine has no CUDA device: there are 2"):
            Ranks(rank=2, size=4, local_rank=2).use(torch.device("cuda"))

    def test_numbers_are_read_by_name(self):
        numbers = {"tokens": 2.0**24 + 1, "loss": torch.tensor(0.1), "memory": 0.25}
        assert ALONE.gather_numbers(numbers) == [{**numbers, "loss": float(torch.tensor(0.1))}]
        assert ALONE.gather_numbers({"tokens": 3.0}) == [{"tokens": 3.0}]

    def test_nothing_to_fill_in(self):
        values = torch.tensor([1.0, torch.nan])
        assert ALONE.fill_in(values) is values


class TestStrategy:
    @pytest.mark.parametrize(
        ("wanted", "size", "offload", "expected"),
        [
            ("auto", 1, False, "one process"),
            ("fsdp2", 1, False, "one process"),
            ("auto", 2, False, "ddp"),
            ("ddp", 2, False, "ddp"),
            ("fsdp2", 2, False, "fsdp2"),
            ("auto", 2, True, "fsdp2"),
            ("auto", 1, True, "fsdp2"),
        ],
    )
    def test_choice(self, wanted, size, offload, expected):
        assert choose_strategy(wanted, Ranks(size=size), offload=offload, whole_fits=lambda: True) == expected

    def test_what_fits_decides(self):
        choose = partial(choose_strategy, "auto", offload=False)
        assert choose(Ranks(size=2), whole_fits=lambda: False) == "fsdp2"
        assert choose(Ranks(size=1), whole_fits=lambda: False) == "one process"
        assert choose(Ranks(size=4, tensor_parallel=2), whole_fits=lambda: True) == "fsdp2"
        assert choose(Ranks(size=2, tensor_parallel=2), whole_fits=lambda: True) == "one process"
        with pytest.raises(UserError, match="--strategy ddp holds no model that is split besides: take fsdp2"):
            choose_strategy("ddp", Ranks(size=4, tensor_parallel=2), offload=False, whole_fits=lambda: True)

    def test_one_process_calls_the_module_itself(self):
        module = nn.Linear(2, 2)
        strategy = Strategy(module)
        assert strategy.module is module
        assert strategy.whole_weights(module, trained_alone=False) is None
        with strategy.micro_batch(last=False):
            pass

    def test_clipping_returns_the_norm_before(self):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        assert float(clip_gradients([weight], 1.0)) == 5.0
        assert float(weight.grad.norm()) == pytest.approx(1.0)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
    def test_layers_are_the_list_with_most_weights(self, family):
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": []}
        model = tiny_model(family, **(experts if family == "qwen3_moe" else {}))
        layers = decoder_layers(model)
        assert len(layers) == 2
        assert len({type(layer) for layer in layers}) == 1
        names = {name for name, part in model.named_modules() if any(part is layer for layer in layers)}
        assert names in ({"model.layers.0", "model.layers.1"}, {"transformer.h.0", "transformer.h.1"})


class TestSameEverywhere:
    """Every rank reads settings and data itself."""

    def test_other_data_is_refused(self, toy_settings, tmp_path, monkeypatch):
        def gather(_: Ranks, value: Any) -> list[Any]:
            of_data = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
            return [value, ("other", "")] if of_data else [value]

        monkeypatch.setattr(Ranks, "gather_objects", gather)
        with pytest.raises(UserError, match="process 1 has read other settings or other pairs than process 0"):
            train(parse("train", options(**toy_settings, output=tmp_path / "run")))
        assert not (tmp_path / "run").exists()

    def test_another_way_to_hold_the_model_is_refused(self, toy_settings, tmp_path, monkeypatch):
        def gather(_: Ranks, value: Any) -> list[Any]:
            return [value, "fsdp2 True"] if isinstance(value, str) else [value]

        monkeypatch.setattr(Ranks, "gather_objects", gather)
        with pytest.raises(UserError, match="choose different ways to hold the model, as their devices have different"):
            train(parse("train", options(**toy_settings, output=tmp_path / "run")))


class TestReference:
    def test_a_pair_of_another_rank_ends_all(self, monkeypatch):
        """Named by every rank, after the last pass: the others wait in each of them."""
        monkeypatch.setattr(Ranks, "gather_objects", lambda _, value: [value, [1]])
        with pytest.raises(UserError, match=r"no finite log-prob to pairs\.jsonl:2; "):
            score_reference(policy_of(tiny_model(dtype=torch.float32)), PAIRS, [BATCH], 6, progress=False, ranks=ALONE)
