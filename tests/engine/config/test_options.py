"""Settings: what the command line and --config files make of them, and which contradict each other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fused_dpo.losses import LOSS_TYPES
from fused_dpo_engine.cli import parse
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import LossOptions
from fused_dpo_engine.errors import UserError
from tests.engine.support.toys import options

REQUIRED = {"model": "a/model", "data": "pairs.jsonl", "output": "out"}
FIELDS = [field for group in dataclasses.fields(TrainConfig) for field in dataclasses.fields(group.type)]  # pyright: ignore[reportArgumentType]


def with_required(*arguments: str, **settings: Any) -> TrainConfig:
    """With the required options, unless they are set to None."""
    return parse("train", [*options(**{**REQUIRED, **settings}), *arguments])


def config_file(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


class TestCommandLine:
    def test_defaults(self):
        config = with_required()
        assert (config.model.model, config.data.data, config.run.output) == ("a/model", "pairs.jsonl", "out")
        flat = config.flat()
        expected = {
            "beta": 0.1,
            "loss_type": "sigmoid",
            "learning_rate": 5e-6,
            "tokens_per_batch": 8192,
            "pairs_per_step": 16,
            "seed": 0,
            "dtype": "auto",
            "eval_data": None,
            "max_steps": None,
            "ref_model": None,
            "lora_rank": 0,
            "trust_remote_code": False,
        }
        assert {name: flat[name] for name in expected} == expected

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("model", "other"),
            ("data", "other.parquet"),
            ("output", "elsewhere"),
            ("eval_data", "test.jsonl"),
            ("max_steps", 7),
            ("beta", 0.25),
            ("loss_type", "ipo"),
            ("learning_rate", 5e-7),
            ("tokens_per_batch", 4096),
            ("pairs_per_step", 3),
            ("seed", 11),
            ("dtype", "bfloat16"),
            ("lora_target_modules", ("q_proj", "v_proj")),
            ("gradient_checkpointing", True),
            ("offload_activations", True),
            ("optimizer", "adamw8bit"),
            ("report_to", ("wandb", "trackio")),
            ("max_length", 100),
            ("packing", False),
            ("prefix_sharing", False),
            ("batches_per_step", 2),
            ("plan_window", 512),
            ("attention", "varlen"),
            ("liger", True),
            ("compile", True),
        ],
    )
    def test_documented_names(self, name, value):
        before, after = with_required().flat(), with_required(**{name: value}).flat()
        assert before[name] != value
        assert {key for key in before if before[key] != after[key]} == {name}
        assert after[name] == value

    @pytest.mark.parametrize("missing", REQUIRED)
    def test_required(self, missing, capsys):
        with pytest.raises(SystemExit) as caught:
            with_required(**{missing: None})
        assert caught.value.code == 2
        assert f"--{missing}" in capsys.readouterr().err

    def test_names_are_unique_and_every_field_says_what_it_is(self, capsys):
        names = [field.name for field in FIELDS]
        assert len(names) == len(set(names))
        with pytest.raises(SystemExit) as caught:
            parse("train", ["--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        words = set(shown.replace("|", " ").replace(",", " ").split())
        for name in names:
            assert f"--{name.replace('_', '-')}" in words, name
        assert "--config FILE.yaml" in shown
        assert all(loss_type in shown for loss_type in LOSS_TYPES)

    def test_the_list_of_losses_in_the_help_is_whole(self):
        assert LossOptions.__doc__
        for loss_type in LOSS_TYPES:
            assert LossOptions(loss_type=loss_type).module().loss_type == loss_type


class TestConfigFile:
    def test_yaml(self, tmp_path):
        path = config_file(
            tmp_path,
            """
            # comments, numbers as people write them, dashes or underscores
            model: a/model
            data: pairs.jsonl
            output: out
            learning_rate: 5e-7
            tokens-per-batch: 4096
            max_steps: 12
            gradient-checkpointing: true
            report-to: [tensorboard, wandb]
            eval_data: null
            lora-target-modules: [q_proj, v_proj]
            """,
        )
        config = parse("train", ["--config", str(path)])
        expected = with_required(
            learning_rate=5e-7,
            tokens_per_batch=4096,
            max_steps=12,
            gradient_checkpointing=True,
            report_to=("tensorboard", "wandb"),
            lora_target_modules=("q_proj", "v_proj"),
        )
        assert config == expected
        assert config.optimizer.learning_rate == 5e-7
        assert parse("train", [f"--config={path}"]) == expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"learning_rate": 3e-6, "lora_rank": 4, "max_length": 77, "overwrite": True},
            {"packing": False, "loss_type": "simpo"},
            {"lora_rank": 4, "lora_alpha": 2, "eval_fraction": 0.5, "best_metric": "eval_rewards/margins"},
            {},
        ],
        ids=str,
    )
    def test_a_saved_config_reads_back(self, tmp_path, settings):
        config = with_required(**settings)
        (tmp_path / "config.json").write_text(config.as_json(), encoding="utf-8")
        assert parse("train", ["--config", str(tmp_path / "config.json")]) == config
        assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).keys() == {f.name for f in FIELDS}

    @pytest.mark.parametrize(("older", "now"), [(True, ("tensorboard",)), (False, ("none",))])
    def test_names_that_options_once_had(self, tmp_path, older, now):
        assert with_required(tensorboard=older).run.report_to == now
        path = config_file(tmp_path, f"tensorboard: {str(older).lower()}\n")
        assert parse("train", [*options(**REQUIRED), "--config", str(path)]).run.report_to == now

    @pytest.mark.parametrize("first", [True, False])
    def test_the_command_line_wins(self, tmp_path, first):
        path = config_file(tmp_path, "beta: 0.5\nseed: 3\noverwrite: true\nlora_target_modules: [a, b]\n")
        given = ["--beta", "0.2", "--no-overwrite", "--lora-target-modules", "c"]
        from_file = ["--config", str(path)]
        config = with_required(*(from_file + given if first else given + from_file))
        assert (config.loss.beta, config.run.seed, config.run.overwrite) == (0.2, 3, False)
        assert config.lora.lora_target_modules == ("c",)

    def test_later_files_win(self, tmp_path):
        one = config_file(tmp_path, "beta: 0.5\nseed: 3\n", "one.yaml")
        two = config_file(tmp_path, "beta: 0.6\n", "two.yaml")
        config = with_required("--config", str(one), "--config", str(two))
        assert (config.loss.beta, config.run.seed) == (0.6, 3)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("lerning_rate: 1\n", r"unknown option 'lerning_rate'; did you mean learning_rate"),
            ("max-stepz: 1\n", r"unknown option 'max-stepz'; did you mean max_steps"),
            ("zzz: 1\n", r"unknown option 'zzz'"),
            ("loss:\n  beta: 1\n", r"unknown option 'loss'"),
            ("- beta\n", r"must hold `name: value` lines, got list"),
            ("", r"must hold `name: value` lines, got NoneType"),
            ("beta: [1\n", r"is not valid YAML"),
            ("beta: !!python/object/apply:os.getcwd []\n", r"is not valid YAML"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        path = config_file(tmp_path, text)
        with pytest.raises(UserError, match=rf"{path}.*{message}"):
            with_required("--config", str(path))

    @pytest.mark.parametrize("arguments", [["--config", "nowhere.yaml"], ["--config"], ["--config="]])
    def test_missing_files(self, arguments):
        with pytest.raises(UserError, match="--config needs an existing YAML file"):
            with_required(*arguments)

    def test_bytes_that_are_no_text(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_bytes(b"seed: 1 # \xff\n")
        with pytest.raises(UserError, match=str(path)):
            with_required("--config", str(path))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: many\n", "seed must be a whole number, got 'many'"),
            ("pairs-per-step: 2.5\n", "pairs-per-step must be a whole number, got 2.5"),
            ("max_steps: true\n", "max_steps must be a whole number, got True"),
            ("beta: [0.1]\n", r"beta must be a number, got \[0.1\]"),
            ("lora_alpha: big\n", "lora_alpha must be a number, got 'big'"),
            ("liger: 'false'\n", "liger must be true or false, got 'false'"),
            ("packing: 1\n", "packing must be true or false, got 1"),
            ("data: [a.jsonl, b.jsonl]\n", r"data must be a text, got \['a.jsonl', 'b.jsonl'\]"),
            ("model: {path: x}\n", "model must be a text, got {'path': 'x'}"),
            ("ref_model: {path: x}\n", "ref_model must be a text, got {'path': 'x'}"),
            ("lora_target_modules: [a, [b]]\n", "lora_target_modules must be a list of texts"),
            ("report_to: [wandb, mlflow]\n", "report_to must be a list, each one of tensorboard, wandb, trackio, none"),
            ("dtype: float16\n", "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ],
    )
    def test_values_of_another_type(self, tmp_path, text, message):
        path = config_file(tmp_path, text)
        with pytest.raises(UserError, match=rf"{path}: {message}"):
            with_required("--config", str(path))

    def test_values_as_people_write_them(self, tmp_path):
        text = "beta: 1\nlearning_rate: 5e-7\nseed: '3'\noutput: 7\npacking: null\nlora_target_modules: q_proj\n"
        config = with_required("--config", str(config_file(tmp_path, text)), output=None)
        assert (config.loss.beta, config.optimizer.learning_rate, config.run.seed) == (1.0, 5e-7, 3)
        assert (config.run.output, config.packing.packing, config.lora.lora_target_modules) == ("7", True, ("q_proj",))


class TestHomeFolder:
    """A shell leaves `--model=~/x` and files as they are."""

    def test_expanded_on_the_command_line_and_in_files(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        expected = {name: f"/home/someone/{name}" for name in ("model", "ref_model", "chat_template")}
        config = with_required(**{name: f"~/{name}" for name in expected})
        assert {name: config.flat()[name] for name in expected} == expected
        lines = "".join(f"{name}: ~/{name}\n" for name in expected)
        again = parse("train", ["--config", str(config_file(tmp_path, lines + "data: pairs.jsonl\noutput: out\n"))])
        assert again == config

    def test_plan(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        config = parse("plan", options(model="~/m", data="x.jsonl", chat_template="~/t"))
        assert (config.model_options.model, config.data.chat_template) == ("/home/someone/m", "/home/someone/t")

    def test_names_are_left_alone(self):
        config = with_required(model="org/name~1")
        assert config.model.model == "org/name~1"
        assert config.model.ref_model is None


HELD_OUT = {"eval_fraction": 0.1}


class TestContradictions:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"workspace_mib": 0}, "workspace-mib must be at least 1"),
            ({"lora_rank": -1}, "lora-rank must be 0 (off) or positive, got -1"),
            ({"eval_fraction": 1.0}, "eval-fraction must lie in [0, 1), got 1.0"),
            ({"eval_fraction": -0.1}, "eval-fraction must lie in [0, 1), got -0.1"),
            ({"eval_fraction": "nan"}, "eval-fraction must lie in [0, 1), got nan"),
            ({"data": ""}, "data must name a file, folder or data set, got ''"),
            ({"eval_data": ""}, "eval-data must name a file, folder or data set, got ''"),
            ({"eval_data": "x.jsonl", **HELD_OUT}, "eval-data and eval-fraction both"),
            ({"max_length": 1}, "max-length must be at least 2"),
            ({"max_length": 4097}, "2 x max-length = 8194 tokens, more than tokens-per-batch = 8192"),
            ({"loss_type": "sigmod"}, "did you mean 'sigmoid'?"),
            ({"beta": 0}, "beta must be > 0"),
            ({"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
            (
                {"loss_type": "hinge", "label_smoothing": 0.1},
                "label_smoothing must be left at 0.0 for loss_type 'hinge'",
            ),
            ({"sft_weight": -1}, "sft_weight must be >= 0"),
            ({"simpo_gamma": 1}, "simpo_gamma must be left at 0.5 for loss_type 'sigmoid'"),
            ({"ld_alpha": 1.5}, "ld-alpha must lie in [0, 1], got 1.5"),
            ({"dpop_lambda": 1}, "dpop_lambda must be left at 50.0 for loss_type 'sigmoid'"),
            ({"loss_type": "ipo", "odpo_alpha": 1}, "odpo_alpha must be left at 0.0 for loss_type 'ipo'"),
            ({"loss_type": "plackett_luce", "ld_alpha": 0.5}, "ld-alpha compares the two lengths of a pair"),
            ({"loss_type": "plackett_luce", "pairs": "all"}, "plackett_luce takes the ranking of a row as a whole"),
            ({"learning_rate": 0}, "learning-rate must be positive, got 0.0"),
            ({"learning_rate": "nan"}, "learning-rate must be positive, got nan"),
            ({"warmup_ratio": 1.1}, "warmup-ratio must lie in [0, 1], got 1.1"),
            ({"max_grad_norm": -1}, "max-grad-norm must not be negative"),
            ({"tensor_parallel": 0}, "tensor-parallel must be at least 1, got 0"),
            ({"tensor_parallel": 2, "offload": True}, "which shares out whole weights; leave out --tensor-parallel"),
            ({"timeout_minutes": 0}, "timeout-minutes must be positive and finite, got 0.0"),
            ({"offload": True, "strategy": "ddp"}, "offload is FSDP2's; leave out --strategy ddp"),
            ({"load_in_4bit": True, "lora_rank": 2, "strategy": "fsdp2"}, "quantised weights are not cut into shares"),
            ({"load_in_4bit": True, "lora_rank": 2, "offload": True}, "quantised weights are not cut into shares"),
            ({"weight_decay": -0.1}, "weight-decay must not be negative"),
            ({"pairs_per_step": 0}, "pairs-per-step must be at least 1, got 0"),
            ({"batches_per_step": 0}, "batches-per-step must be at least 1, got 0"),
            ({"plan_window": 0}, "plan-window must be at least 1, got 0"),
            ({"tokens_per_batch": 3}, "tokens-per-batch must be at least 4, got 3"),
            ({"eval_steps": -1}, "eval-steps must be at least 0"),
            ({"save_steps": -1}, "save-steps must be at least 0"),
            ({"max_steps": 0}, "max-steps must be at least 1"),
            ({"epochs": 0}, "epochs must be positive"),
            ({"early_stopping_patience": -1}, "early-stopping-patience must not be negative"),
            ({"eval_steps": 5}, "need held-out pairs: give --eval-data or --eval-fraction"),
            ({"early_stopping_patience": 1, **HELD_OUT}, "give --eval-steps too"),
            ({"lora_rank": 2, "ref_model": "r"}, "leave out --ref-model"),
            ({"loss_type": "simpo", "ref_model": "r"}, "simpo takes no reference; leave out --ref-model"),
            ({"loss_type": "orpo", "ref_model": "r"}, "orpo takes no reference; leave out --ref-model"),
            ({"lora_rank": 2, "lora_alpha": 0}, "lora-alpha must be positive and finite, got 0"),
            ({"lora_rank": 2, "lora_alpha": "nan"}, "lora-alpha must be positive and finite, got nan"),
            ({"lora_rank": 2, "lora_alpha": "inf"}, "lora-alpha must be positive and finite, got inf"),
            ({"lora_alpha": 8}, "lora-alpha scales adapters: give --lora-rank too"),
            ({"best_metric": "eval_rewards/margins"}, "best-metric looks at held-out pairs: give --eval-data"),
            ({"attention": "sdpa", "packing": False}, "leave out --attention, or give --attention auto"),
            ({"weight_decay": "inf"}, "weight-decay must not be negative, and finite, got inf"),
            ({"weight_decay": "nan"}, "weight-decay must not be negative, and finite, got nan"),
            ({"adam_epsilon": "inf"}, "adam-epsilon must be positive and finite, got inf"),
            ({"dtype": "float16"}, "--dtype"),
            ({"lr_scheduler_type": "step"}, "--lr-scheduler-type"),
            ({"best_metric": "loss"}, "--best-metric"),
            ({"pairs_per_step": "many"}, "--pairs-per-step"),
            # Settings that torch or numpy would only refuse in the middle of a run.
            ({"seed": -1}, "seed"),
            ({"seed": 2**70}, "seed"),
            ({"epochs": "inf"}, "epochs"),
            ({"adam_beta1": 1.0}, "beta1"),
            ({"adam_beta2": -0.1}, "beta2"),
            ({"adam_epsilon": -1e-8}, "epsilon"),
        ],
        ids=str,
    )
    def test_refused(self, settings, message, capsys):
        with pytest.raises((SystemExit, UserError)) as caught:
            with_required(**settings)
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2
        shown = " ".join((capsys.readouterr().err + str(caught.value)).replace("│", " ").split())
        assert message in shown

    @pytest.mark.parametrize(
        "settings",
        [
            {"eval_data": "x.jsonl", "eval_steps": 5, "early_stopping_patience": 2},
            {**HELD_OUT, "eval_steps": 5},
            {"max_length": 4096},
            {"loss_type": "simpo", "simpo_gamma": 1.0},
            {"loss_type": "robust", "label_smoothing": 0.1},
            {"lora_rank": 2, "lora_alpha": 4},
            {"best_metric": "eval_rewards/margins", **HELD_OUT},
            {"attention": "auto", "packing": False},
            {"loss_type": "ipo", "ref_model": "r"},
            {"max_grad_norm": 0},
            {"warmup_ratio": 1},
            {"warmup_ratio": 0},
            {"ld_alpha": 0},
            {"pairs": "all", "odpo_alpha": 0.5},
            {"loss_type": "dpop", "dpop_lambda": 5.0},
            {"loss_type": "plackett_luce", "pairs": "best"},
            {"max_steps": 1, "pairs_per_step": 1, "tokens_per_batch": 4},
        ],
        ids=str,
    )
    def test_accepted(self, settings):
        flat = with_required(**settings).flat()
        assert {name: flat[name] for name in settings} == settings
