"""The settings that a run chooses: by the data and the width, and never over what the user gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_lines
from tiny import OTHERS, TEXTS, bert_of_texts
from transformers import LlamaConfig

from hf_lora.tasks.base import Data
from hf_lora.tasks.causal_lm import rate_for_width
from hf_lora.tasks.registry import CAUSAL_LM, TASKS
from hf_lora.train.arguments import LoraTrainingArguments
from hf_lora.train.defaults import EPOCHS, LENGTHS, MUON, MUON_STEPS, PACKED_STEPS, STEPS, choose
from hf_lora.train.parsing import Parsed, parse_arguments
from hf_lora.train.run_data import read_data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


def read(base: str, file: Path, *words: str) -> tuple[Parsed, Data]:
    parsed = parse_arguments(["--model", base, "--train-file", str(file), "--use-cpu", *words])
    return parsed, read_data(parsed, writes=False)


def labeled(file: Path, count: int) -> Path:
    lines = [{"text": (TEXTS + OTHERS)[i % 16], "label": "ab"[i % 2]} for i in range(count)]
    return Path(write_lines(file, lines))


@pytest.mark.parametrize("count", [16, 600, 3000])
def test_a_classifier_is_trained_for_enough_steps(count: int, base: str, tmp_path: Path) -> None:
    parsed, data = read(base, labeled(tmp_path / "rows.jsonl", count))
    training = parsed.training
    steps = -(-count // 16) * training.num_train_epochs
    assert EPOCHS[0] <= training.num_train_epochs <= EPOCHS[1]
    assert steps >= STEPS or training.num_train_epochs == EPOCHS[1]
    assert training.num_train_epochs == EPOCHS[0] or steps - -(-count // 16) < STEPS
    assert (training.lora_r, training.lora_alpha, training.loraplus_lr_ratio) == (32, 32, 4)
    assert data.lines[-1].startswith("chosen: --lora-r 32")


def test_what_the_user_gave_stays(base: str, tmp_path: Path) -> None:
    file = labeled(tmp_path / "rows.jsonl", 32)
    words = ("--lora-r", "4", "--num-train-epochs", "2", "--head-learning-rate", "0.01", "--lora-bias", "none")
    training = read(base, file, *words)[0].training
    assert (training.lora_r, training.num_train_epochs, training.head_learning_rate) == (4, 2, 0.01)
    assert training.lora_bias == "none"
    assert training.lora_alpha == 4  # follows the rank, as it was measured
    assert read(base, file, "--lora-alpha", "7")[0].training.lora_alpha == 7
    assert read(base, file, "--max-steps", "5")[0].training.num_train_epochs == 3


def test_the_rate_of_the_head_follows_one_that_is_given(base: str, tmp_path: Path) -> None:
    file = labeled(tmp_path / "rows.jsonl", 32)
    training = read(base, file, "--learning-rate", "2e-5")[0].training
    assert (training.learning_rate, training.loraplus_lr_ratio, training.head_learning_rate) == (2e-5, 4, 6e-5)


def test_rates_are_chosen_only_where_they_can_be_set(base: str, tmp_path: Path) -> None:
    file = labeled(tmp_path / "rows.jsonl", 32)
    for words in (("--lora-init", "mica"), ("--optim", "sgd")):
        training = read(base, file, *words)[0].training
        assert (training.lora_r, training.loraplus_lr_ratio, training.head_learning_rate) == (32, None, None)


def test_numbers_as_labels_keep_the_defaults_of_the_trainer(base: str, tmp_path: Path) -> None:
    lines = [{"text": text, "label": i / 7} for i, text in enumerate(TEXTS + OTHERS)]
    file = Path(write_lines(tmp_path / "rows.jsonl", lines))
    training = read(base, file, "--problem-type", "regression")[0].training
    assert (training.lora_r, training.loraplus_lr_ratio, training.num_train_epochs) == (8, None, 3)


def test_the_rate_of_a_language_model_falls_with_its_width() -> None:
    assert rate_for_width(576) == 1e-3
    rates = [rate_for_width(width) for width in (128, 576, 1024, 2048, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 2e-3
    assert 1.5e-4 < rate_for_width(4096) < 3e-4  # where others begin with several billion parameters


@pytest.mark.parametrize(
    ("options", "fewest"),
    [("", MUON_STEPS), ("--muon-learning-rate 0.008", MUON_STEPS), ("--optim adamw_torch", PACKED_STEPS)],
)
@pytest.mark.parametrize(
    ("rows", "tokens", "muon", "adamw"),
    [
        (800, 100, 1024, 1024), (400, 100, 512, 1024), (200, 100, 256, 512), (800, 500, 1024, 1024),
        (20, 30, 128, 128), (20, 300, 512, 512), (5000, 100, 1024, 1024), (10, 1024, 1024, 1024),
    ],
)  # fmt: skip
def test_packed_rows_are_as_long_as_the_steps_allow(
    rows: int, tokens: int, muon: int, adamw: int, options: str, fewest: int
) -> None:
    """Never shorter than the longest text, which would be cut."""
    words = ["--model", "m", "--train-file", "f", "--use-cpu", *options.split()]
    parsed, expected = parse_arguments(words), muon if fewest == MUON_STEPS else adamw
    config = llama(576)
    parsed.training.per_device_train_batch_size = 1
    from datasets import Dataset

    data = Data(TASKS[CAUSAL_LM], config, None, length=1024)
    data.rows["train"] = Dataset.from_dict({"input_ids": [[1] * tokens] * rows})
    said = str(choose(parsed, data))
    assert data.length == expected
    assert data.length >= tokens
    steps = 3 * rows * tokens / data.length
    assert steps >= fewest or data.length == min(length for length in LENGTHS if length >= tokens)
    rates = {"": " --muon-learning-rate 0.008", "--optim adamw_torch": " --loraplus-lr-ratio 4"}.get(options, "")
    assert f"--learning-rate 0.001{rates} (for the width 576)" in said
    assert (f"--max-length {expected}" in said) == (expected < 1024)
    given = parse_arguments(["--model", "m", "--train-file", "f", "--use-cpu", "--max-length", "900"])
    data.length = 900
    choose(given, data)
    assert data.length == 900


@pytest.mark.parametrize(
    "line",
    [
        "--learning-rate 5e-4", "--learning-rate auto", "--loraplus-lr-ratio 2", "--optim adafactor",
        "--lora-init pissa", "--lora-use-dora", "--lora-alora-invocation-tokens 3", "--lora-method lora_fa",
        "--lora-adapter folder",
        "--lora-target-modules embed_tokens", "--lora-target-modules embed_tokens q_proj",
        "--fsdp full_shard --accept-ddp-fallback",
    ],
)  # fmt: skip
def test_lora_muon_is_chosen_only_for_runs_as_they_were_measured(line: str) -> None:
    assert chosen_for_a_language_model().muon_learning_rate == MUON
    assert chosen_for_a_language_model("--lora-target-modules", "q_proj").muon_learning_rate == MUON
    assert chosen_for_a_language_model("--lora-r", "8", "--weight-decay", "0.1").muon_learning_rate == MUON
    assert chosen_for_a_language_model(*line.split()).muon_learning_rate is None
    assert chosen_for_a_language_model(width=2048).muon_learning_rate is None
    assert chosen_for_a_language_model("--muon-learning-rate", "0.02").muon_learning_rate == 0.02


def chosen_for_a_language_model(*words: str, width: int = 576) -> LoraTrainingArguments:
    from datasets import Dataset

    parsed = parse_arguments(["--model", "m", "--train-file", "f", "--use-cpu", *words])
    rows = {"train": Dataset.from_dict({"input_ids": [[1] * 50] * 400})}
    choose(parsed, Data(TASKS[CAUSAL_LM], llama(width), None, length=1024, rows=rows))
    return parsed.training


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ("", "no"), ("--eval-file e.csv", "epoch"), ("--eval_split=test", "epoch"),
        ("--eval-file e.csv --eval-strategy no", "no"), ("--eval-file e.csv --eval-steps 5", "steps"),
        ("--eval-file e.csv --evaluation-strategy steps", "steps"), ("--test-file e.csv", "no"),
        ("--eval-file e.csv --load-best-model-at-end", "epoch"),
    ],
)  # fmt: skip
def test_evaluation_data_are_used_after_each_epoch(words: str, strategy: str) -> None:
    for argv, config in ((words.split(), {}), ([], {"eval_file": None})):
        found = parse_arguments(["--model", "m", "--train-file", "f", *argv], config)
        assert found.training.eval_strategy == (strategy if argv else "no")


def test_a_language_model_whose_config_names_no_width_keeps_its_rates() -> None:
    from datasets import Dataset

    class Config:
        def get_text_config(self) -> Config:
            return self

    parsed, config = parse_arguments(["--model", "m", "--train-file", "f", "--use-cpu"]), Config()
    before = parsed.training.learning_rate
    rows = {"train": Dataset.from_dict({"input_ids": [[1] * 50] * 400})}
    choose(parsed, Data(TASKS[CAUSAL_LM], config, None, length=1024, rows=rows))  # type: ignore[arg-type]
    assert (parsed.training.lora_r, parsed.training.learning_rate) == (64, before)
    assert parsed.training.muon_learning_rate is None


def llama(width: int) -> Any:
    return LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=64
    )


@pytest.mark.parametrize(("kind", "default"), [("logging", "epoch"), ("save", "epoch"), ("eval", "no")])
def test_a_number_of_steps_chooses_the_strategy_of_steps(kind: str, default: str) -> None:
    """As for Trainer, whose default strategy of the first two is that of steps; a strategy that is given stays."""
    basic = ["--model", "m", "--train-file", "f", "--use-cpu"]
    name = f"{kind}_strategy"
    assert getattr(parse_arguments(basic).training, name) == default
    assert getattr(parse_arguments([*basic, f"--{kind}-steps", "5"]).training, name) == "steps"
    both = parse_arguments([*basic, f"--{kind}-steps", "5", f"--{kind}-strategy", "epoch"])
    assert getattr(both.training, name) == "epoch"
    assert getattr(parse_arguments(basic, {f"{kind}_steps": 5}).training, name) == "steps"
