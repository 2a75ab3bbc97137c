"""The benchmarks measure what they say, on small problems, and give nothing that is wrong a time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.heads import replay
from benchmarks.heads import run as head
from benchmarks.heads.cases import AXES, FORWARD, HEADS, LOSS, PHASES, TRAIN, Case, head_cases, scaling_cases
from benchmarks.heads.peers import IMPLEMENTATIONS, Implementation, per_sequence
from benchmarks.heads.stages import stages_of
from benchmarks.heads.truth import BF16_LOGITS, EXACT, FILTERED, IN_FLOAT32, over_budget, truth, upstream
from benchmarks.measure import compute_dtype, cpu_features, environment, isolated, peak_growth_mib, quantiles, timed
from benchmarks.reporting import records

SMALL = Case("tiny", 150, 512, 2000)
"""Its hidden size is below that of the shared file of hidden states, so its logits are synthetic."""
HERE = [name for name, way in IMPLEMENTATIONS.items() if not way.absent()]
COMPILED = {"torch.compile naive", "Cut Cross-Entropy"}
"""Inductor takes a minute of a busy machine; `pytest benchmarks/` itself checks them."""


def allocate(mib: int) -> int:
    return len(bytearray(mib * 2**20))


def grow(mib: int) -> float:
    return peak_growth_mib(lambda: allocate(mib))[1]


def grow_twice(mib: int) -> float:
    blocks = [bytearray(2**20) for _ in range(mib)]
    del blocks
    return peak_growth_mib(lambda: [bytearray(2**20) for _ in range(mib)])[1]


class TestMeasure:
    def test_the_dtype_and_features_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By what the project takes the CPU to have, and a mask is told."""
        for units, dtype in ((True, "bfloat16"), (False, "float32")):
            monkeypatch.setattr("benchmarks.measure.has_bf16_units", lambda _, units=units: units)
            assert compute_dtype("cpu") == dtype
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert cpu_features().endswith("; ONEDNN_MAX_CPU_ISA=AVX2")

    def test_the_environment_without_a_repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor git: the results are written all the same, and the commit can be told."""
        monkeypatch.setenv("PATH", "")
        environment.cache_clear()
        assert environment()["commit"] == "unknown"
        monkeypatch.setenv("FUSED_DPO_COMMIT", "abc1234")
        environment.cache_clear()
        assert environment()["commit"] == "abc1234"
        environment.cache_clear()

    @pytest.mark.parametrize("mib", [50, 200])
    def test_peak_growth(self, mib: int) -> None:
        """What was allocated and freed again, in a process of its own."""
        assert isolated(grow, mib) == pytest.approx(mib, abs=10)

    def test_memory_that_was_used_before_counts_again(self) -> None:
        assert isolated(grow_twice, 100) == pytest.approx(100, abs=10)

    def test_timed(self) -> None:
        result, seconds = timed(lambda: sum(range(1000)))
        assert result == 499500
        assert 0 < seconds < 1

    def test_quantiles(self) -> None:
        assert quantiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median_s": 3.5, "p20_s": 2, "p80_s": 5, "rounds": 6}

    def test_environment_names_what_a_result_belongs_to(self) -> None:
        assert environment()["torch"] == torch.__version__
        assert all(environment().values())


class TestRecords:
    def test_every_row_is_on_its_line(self, tmp_path: Path) -> None:
        rows = [{"id": "a", "x": 0.1}, {"id": "b/c", "failed": 'it said "no"'}]
        records.write(tmp_path / "new" / "r.json", rows)
        record = records.read(tmp_path / "new" / "r.json")
        assert list(record.rows.values()) == rows
        assert record.environment == environment()
        lines = record.path.read_text().splitlines()
        for row in rows:
            assert json.loads(lines[record.lines[row["id"]] - 1].rstrip(",")) == row

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"rows": []}',
            '{"environment": {}, "rows": [{}]}',
            '{"environment": {}, "rows": 1}',
            '{"environment": 3, "rows": []}',
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is not a results file"):
            records.read(path)

    def test_an_id_stands_for_one_row(self, tmp_path: Path) -> None:
        records.write(tmp_path / "x.json", [{"id": "a"}, {"id": "a"}])
        with pytest.raises(ValueError, match="names a row twice"):
            records.read(tmp_path / "x.json")


class TestCases:
    @pytest.mark.parametrize("gpu", [False, True])
    def test_names_tell_cases_apart(self, gpu: bool) -> None:
        cases = head_cases(gpu)
        assert len({(case.name, phase) for case, phase in cases}) == len(cases)
        assert {phase for _, phase in cases} == set(PHASES)
        assert {case.trainable for case, _ in cases} == {True, False}
        assert {case.logits for case, _ in cases} == {"real", "random"}

    def test_all_models_and_lengths_on_a_gpu(self) -> None:
        cases = [case for case, _ in head_cases(gpu=True)]
        assert {case.model for case in cases} == set(HEADS)
        assert {case.lengths for case in cases} == {"hh_helpful", "dpo_en"}
        assert {case.N for case in scaling_cases("N", gpu=True)} >= {1024, 32768}

    @pytest.mark.parametrize("axis", AXES)
    def test_scaling_changes_one_thing(self, axis: str) -> None:
        cases = scaling_cases(axis, gpu=False)
        assert len({getattr(case, axis) for case in cases}) == len(cases) >= 4
        assert len({replace(case, **{axis: 1}) for case in cases}) == 1

    def test_passes(self) -> None:
        frozen = replace(SMALL, trainable=False)
        assert [SMALL.passes(FORWARD), SMALL.passes(TRAIN), frozen.passes(TRAIN), frozen.passes(LOSS)] == [1, 3, 2, 2]


class TestReplay:
    @pytest.mark.parametrize("N", [1, 2, 3, 63, 2048, 40000])
    @pytest.mark.parametrize("lengths", replay.LENGTHS)
    def test_offsets_of_pairs(self, N: int, lengths: str) -> None:
        offsets = replay.sequence_offsets(N, lengths)
        assert (offsets[0], offsets[-1], offsets.dtype) == (0, N, torch.int32)
        assert (offsets.diff() > 0).all()
        assert N == 1 or len(offsets) % 2 == 1

    def test_lengths_are_those_of_the_answers(self) -> None:
        (_, chosen, rejected), *_ = replay.LENGTHS["qa_long_prompts"]
        assert replay.sequence_offsets(2048, "qa_long_prompts").diff()[:2].tolist() == [chosen, rejected]

    def test_the_same_in_every_call(self) -> None:
        first, second = (SMALL.problem(None, "cpu") for _ in range(2))
        assert first.source == second.source == "synthetic logits"
        assert all(map(torch.equal, first[:4], second[:4]))

    def test_real_logits_survive_the_lift(self) -> None:
        if not replay.SHARED_HIDDEN.is_file():
            pytest.skip("no file of real hidden states in ../shared/data/hidden")
        plain, lifted = replay.replay(64, 576, 49152), replay.replay(64, 1024, 60000)
        assert plain.source == lifted.source == "real-logit replay"
        logits, same = (p.hidden.float() @ p.weight[:49152].float().T for p in (plain, lifted))
        assert float((logits - same).norm() / logits.norm()) < 0.01  # both were rounded to bf16 once more
        added = (lifted.hidden.float() @ lifted.weight.float().T).softmax(-1)[:, 49152:]
        assert float(added.sum(-1).mean()) < 0.05
        assert torch.equal(plain.target, lifted.target)

    def test_a_named_file_is_never_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "hidden.safetensors"
        with pytest.raises(FileNotFoundError):
            SMALL.problem(path, "cpu")
        save_file({"hidden": torch.zeros(3, 600)}, path)
        with pytest.raises(ValueError, match="has hidden size 600, more than the 512 wanted"):
            SMALL.problem(path, "cpu")

    @pytest.mark.parametrize("make", ["real", "synthetic", "random"])
    def test_what_the_logits_are_like(self, make: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The stand-in is like the real ones, and random logits are nothing like them."""
        if make == "real" and not replay.SHARED_HIDDEN.is_file():
            pytest.skip("no file of real hidden states in ../shared/data/hidden")
        if make == "random":
            problem = replay.random_logits(256, 576, 49152)
        else:
            if make == "synthetic":
                monkeypatch.setattr(replay, "SHARED_HIDDEN", Path("there is no such file"))
            problem = replay.replay(256, 576, 49152)
        logits = replay.describe(problem)
        if make == "random":
            assert logits["entropy_nats"] > 10
            assert logits["tail"] > 0.9
        else:
            assert 1.5 < logits["entropy_nats"] < 3.5
            assert 0.02 < logits["tail"] < 0.05
            assert 0.03 < logits["kept_fraction_of_block"] < 0.12


@pytest.fixture(scope="module")
def loaded() -> head.Loaded:
    return head.load(SMALL, None, "cpu")


class TestVerification:
    def test_truth_is_autograd_in_float64(self, loaded: head.Loaded) -> None:
        problem = loaded.problem
        hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
        token_logps = (hidden @ weight.T).log_softmax(-1).gather(1, problem.target[:, None]).squeeze(1)
        pieces = token_logps.tensor_split(problem.cu_seqlens[1:-1].tolist())
        logps = torch.stack([piece.sum() for piece in pieces])
        (logps * upstream(problem)).sum().backward()
        got = truth(problem)
        torch.testing.assert_close(got.logps, logps.detach(), rtol=1e-12, atol=0)  # the order of float64 sums
        for mine, true in ((got.dhidden, hidden.grad), (got.dweight, weight.grad)):
            assert true is not None
            assert float((mine - true).norm() / true.norm()) < 1e-7  # rounded to fp32

    def test_upstream_is_what_the_loss_sends_back(self, loaded: head.Loaded) -> None:
        """Up to its scale, at equal policy and reference."""
        logps = loaded.truth.logps.float().requires_grad_()
        way = Implementation("given", lambda *_: logps, EXACT)
        way.loss(loaded.problem, logps, logps, logps.detach()).backward()
        assert logps.grad is not None
        expected = upstream(loaded.problem) * head.BETA / 2 / (len(logps) // 2)
        torch.testing.assert_close(logps.grad, expected)

    @pytest.mark.parametrize("name", [name for name in HERE if name not in COMPILED])
    @pytest.mark.parametrize("phase", PHASES)
    def test_implementations_pass(self, loaded: head.Loaded, name: str, phase: str) -> None:
        if phase != LOSS and IMPLEMENTATIONS[name].logps is None:
            pytest.skip("has a loss only")
        run = head.prepare(name, SMALL, phase, loaded)
        errors, over = head.check(run, loaded.truth)
        assert not over
        assert (
            set(errors)
            == {
                FORWARD: {"worst_logp_error_nat", "token_logp_rms_nat"},
                TRAIN: {"worst_logp_error_nat", "token_logp_rms_nat", "dhidden_error", "dweight_error"},
                LOSS: {"dhidden_error", "dweight_error"},
            }[phase]
        )
        assert min(errors.values()) >= 0

    def test_a_frozen_head_has_no_gradient(self, loaded: head.Loaded) -> None:
        run = head.prepare("fused filtered", replace(SMALL, trainable=False), TRAIN, loaded)
        errors, over = head.check(run, loaded.truth)
        assert not over
        assert "dweight_error" not in errors
        assert run.gradient_mib == loaded.problem.hidden.nbytes / 2**20

    @pytest.mark.parametrize(
        ("fault", "what"),
        [
            (lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t.roll(1)[:, None])[:, 0], "token_logp_rms_nat"),
            (lambda h, w, t: 1.05 * (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0], "token_logp_rms_nat"),
            (lambda h, w, t: (h @ w.detach().roll(1, 0).T).log_softmax(-1).amax(-1), "token_logp_rms_nat"),
            (lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0] * torch.nan, "token_logp_rms_nat"),
            (lambda h, w, t: _scaled_gradient((h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0]), "dhidden_error"),
        ],
        ids=["other targets", "scaled", "other function", "not a number", "scaled gradient"],
    )
    def test_a_wrong_implementation_gets_no_time(
        self, monkeypatch: pytest.MonkeyPatch, loaded: head.Loaded, fault, what: str
    ) -> None:
        wrong = Implementation("wrong", per_sequence(fault), BF16_LOGITS)
        monkeypatch.setitem(IMPLEMENTATIONS, "wrong", wrong)
        _, over = head.check(head.prepare("wrong", SMALL, TRAIN, loaded), loaded.truth)
        assert any(reason.startswith(what) for reason in over)

    @pytest.mark.parametrize("budget", [EXACT, FILTERED])
    def test_bf16_logits_are_told_from_better_ones(
        self, monkeypatch: pytest.MonkeyPatch, loaded: head.Loaded, budget
    ) -> None:
        naive = replace(IMPLEMENTATIONS["naive fp32-upcast"], budget=budget)
        monkeypatch.setitem(IMPLEMENTATIONS, "naive", naive)
        _, over = head.check(head.prepare("naive", SMALL, TRAIN, loaded), loaded.truth)
        assert any(reason.startswith("token_logp_rms_nat") for reason in over)

    @pytest.mark.parametrize("name", [name for name in HERE if name not in COMPILED and IMPLEMENTATIONS[name].logps])
    def test_in_float32(self, name: str) -> None:
        """Everything that is timed there keeps float32's budget, and ours its own where it leaves something out."""
        case = replace(SMALL, dtype="float32")
        way = IMPLEMENTATIONS[name]
        if way.untimed(case.dtype):
            assert name == "naive bf16"
            return
        loaded = head.load(case, None, "cpu")
        assert loaded.problem.hidden.dtype == loaded.problem.weight.dtype == torch.float32
        errors, over = head.check(head.prepare(name, case, TRAIN, loaded), loaded.truth)
        assert over == []
        assert (errors["dhidden_error"] < IN_FLOAT32[BF16_LOGITS].gradient) is (way.budget is not FILTERED)

    def test_control_what_is_rounded_to_bf16_is_over_the_budgets_of_float32(self, loaded: head.Loaded) -> None:
        run = head.prepare("fused exact", SMALL, TRAIN, loaded)
        errors, over = head.check(run, loaded.truth)
        assert over == []
        for budget in (EXACT, BF16_LOGITS):
            assert [reason.split()[0] for reason in over_budget(errors, IN_FLOAT32[budget])] == [
                "dhidden_error",
                "dweight_error",
            ]

    def test_cases_in_float32_are_the_same_numbers(self) -> None:
        """By another name, so that results of both kinds of CPU are not compared with each other."""
        case = replace(SMALL, dtype="float32")
        assert torch.equal(case.problem(None, "cpu").weight, SMALL.problem(None, "cpu").weight.float())
        assert (case.name, SMALL.name) == ("tiny-N150-float32", "tiny-N150")
        assert {case.dtype for case, _ in head_cases(False, "float32")} == {"float32"}
        assert {case.dtype for axis in AXES for case in scaling_cases(axis, False, "float32")} == {"float32"}

    def test_what_is_not_installed_is_said(self) -> None:
        assert Implementation("x", None, EXACT, module="no_such_package").absent() == "no_such_package is not installed"
        assert Implementation("x", None, EXACT).absent() is None


def _scaled_gradient(logps: torch.Tensor) -> torch.Tensor:
    return 1.05 * logps - 0.05 * logps.detach()


class TestRows:
    def test_memory_in_a_process_of_its_own(self) -> None:
        """Full logits take what they take, in fp32 and bf16, and ours do not."""
        case = replace(SMALL, N=1024, V=20000)
        loaded = head.Loaded(case.problem(None, "cpu"), *head.load(SMALL, None, "cpu")[1:])
        mib = {}
        for name in ("naive fp32-upcast", "fused exact"):
            run = head.prepare(name, case, FORWARD, loaded)
            run.ref_logps = torch.zeros(len(loaded.problem.cu_seqlens) - 1)
            mib[name] = head.extra_mib(run, name, case, None)
        logits = 1024 * 20000 / 2**20
        assert 8 * logits * 0.9 < mib["naive fp32-upcast"] < 11 * logits  # fp32 logits and their log-softmax
        assert mib["fused exact"] < 4 * logits

    def test_rates(self) -> None:
        case = Case("x", 1000, 100, 10000)
        assert head.rates(case, TRAIN, 0.5, 0.25) == {"tflop_per_s": 3 * 2e9 / 0.5 / 1e12, "share_of_bare": 0.5}

    def test_the_filter_says_what_it_keeps(self, loaded: head.Loaded) -> None:
        stats = head.filter_stats(loaded.problem)
        assert 0 < stats["kept_fraction"] < 1
        assert 0 < stats["tail"] < 0.1

    def test_stages_sum_to_the_call(self, loaded: head.Loaded) -> None:
        rows = stages_of("tiny", "naive fp32-upcast", head.prepare("naive fp32-upcast", SMALL, TRAIN, loaded))
        assert {"matrix products", "exponentials and softmax", "other"} <= {row["stage"] for row in rows}
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert all(row["id"] == f"stages/tiny/naive fp32-upcast/{row['stage']}" for row in rows)

    def test_bare_matmuls_are_as_many_as_the_phase_needs(self, loaded: head.Loaded) -> None:
        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
                products.append(func is torch.ops.aten.mm.default)
                return func(*args, **(kwargs or {}))

        for case, phase in ((SMALL, FORWARD), (SMALL, TRAIN), (replace(SMALL, trainable=False), TRAIN)):
            products: list[bool] = []
            with Count():
                head.bare_matmuls(case, phase, loaded.problem)()
            assert sum(products) == case.passes(phase)
