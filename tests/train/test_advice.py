"""`recommend`: what `hf-lora train` chooses, from the config alone, near what our tables found best."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines
from tiny import OTHERS, TEXTS, bert_of_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from hf_lora import ConfigError, LoraConfig, apply_lora, recommend
from hf_lora.tasks.base import Data
from hf_lora.tasks.causal_lm import rate_for_width
from hf_lora.tasks.registry import CAUSAL_LM, TASKS
from hf_lora.train.defaults import CLASSIFIERS, FEW_TOKENS, HEAD, RANKS, choose, rank_for, rate_for_classifier
from hf_lora.train.empty import empty_model, parameters_of_a_rank
from hf_lora.train.forecast import forecast
from hf_lora.train.parsing import parse_arguments

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


def language_model(base: str, folder: Path, **sizes: int) -> str:
    """The folder of a language model without weights."""
    LlamaConfig(architectures=["LlamaForCausalLM"], **sizes).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    return language_model(base, tmp_path_factory.mktemp("small"), **sizes)


@pytest.fixture(scope="module")
def large(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of eight billion parameters."""
    sizes = dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256,
        num_key_value_heads=8,
    )  # fmt: skip
    return language_model(base, tmp_path_factory.mktemp("large"), **sizes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, texts = tmp_path_factory.mktemp("rows"), TEXTS + OTHERS
    labeled = [{"sentence": texts[i % 16], "category": "abc"[i % 3]} for i in range(60)]
    pairs = [{"question": text, "answer": text} for text in texts]
    return {
        "text-classification": str(write_lines(folder / "labeled.jsonl", labeled)),
        CAUSAL_LM: str(write_lines(folder / "pairs.jsonl", pairs)),
    }


@pytest.mark.parametrize("task", ["text-classification", CAUSAL_LM])
@pytest.mark.parametrize("more", [{}, {"lora_r": 4, "loraplus_lr_ratio": 2.0, "num_train_epochs": 2}])
def test_a_run_has_the_settings_that_are_recommended(
    task: str, more: dict[str, Any], base: str, small: str, files: dict[str, str]
) -> None:
    """With and without them written out; and none replaces what is given."""
    model, file = small if task == CAUSAL_LM else base, files[task]
    found = recommend(model, file, use_cpu=True, **more)
    assert found.task == task
    plain = parse_arguments([], {"model": model, "train_file": file, "use_cpu": True, **more})
    written = parse_arguments([], found.arguments())
    first, second = forecast(plain), forecast(written)
    assert (first.trained, first.steps, first.targets) == (second.trained, second.steps, second.targets)
    for name, value in found.arguments().items():
        at = plain.run if hasattr(plain.run, name) else plain.training
        assert getattr(at, name) == value or name in ("max_length", "lora_alpha"), name
    chosen = next(line for line in first.lines if line.startswith("chosen: "))
    for setting in found.settings[:-1]:
        assert setting.reason in chosen
        assert all(f"--{name.replace('_', '-')} {value}" in chosen for name, value in setting.values.items())
    assert chosen.count("--") == sum(len(setting.values) for setting in found.settings[:-1])
    assert not {name for setting in found.settings for name in setting.values} & more.keys()
    assert found.to_config() == plain.training.lora_config()
    assert found.facts["steps"] == first.steps
    assert ("by heart" in str(found)) == (task == CAUSAL_LM and not more)
    if task == CAUSAL_LM:  # nothing but factors is trained
        assert found.facts["parameters_of_the_adapter"] == first.trained
        assert found.facts["parameters"] == first.total - first.trained


def test_the_command_and_its_next_step(base: str, files: dict[str, str]) -> None:
    words = (base, files["text-classification"], "--use-cpu", "--label-column", "category")
    text = run_command("recommend", *words).stdout
    found = json.loads(run_command("recommend", *words, "--json").stdout)
    assert found["task"] == "text-classification"
    assert found["facts"]["rows"] == 60
    assert found["facts"]["labels"] == 3
    assert str(recommend(*words[:2], use_cpu=True, label_column="category")) in text
    command = shlex.split(text.splitlines()[-1])
    said = run_command(*command[1:], "--dry-run").stdout
    for setting in found["settings"][:-1]:
        assert all(f"--{name.replace('_', '-')} {value}" in said for name, value in setting["values"].items())
    assert f"in {found['facts']['steps']:,} steps" in said
    assert "no.csv does not exist" in run_command("recommend", base, "no.csv", code=2).stderr


def test_bad_arguments_are_errors_before_the_model_is_loaded(base: str, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="lora_rr is not an argument"):
        recommend(base, files[CAUSAL_LM], lora_rr=3)
    with pytest.raises(ConfigError, match="is unknown"):
        recommend(base, files[CAUSAL_LM], task="chat")


def test_an_argument_that_is_said_again_is_refused(base: str, files: dict[str, str], tmp_path: Path) -> None:
    said = run_command("recommend", base, files[CAUSAL_LM], "--model", "x", "--train_file=y", code=2).stderr
    assert "--model is the first argument" in said
    assert "--train-file is the second argument" in said
    file, given = tmp_path / "run.yaml", ("--model", base, "--data", files[CAUSAL_LM])
    said = run_command("init", CAUSAL_LM, file, *given, "--task", "dpo", "--dataset=x", code=2).stderr
    assert "--task is the first argument" in said
    assert "--dataset is the option --data" in said
    assert not file.exists()


def test_an_adapter_that_goes_on_keeps_its_rank(base: str, files: dict[str, str], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapted = apply_lora(model, LoraConfig(r=5, target_modules=["query"]))
    adapted.save_pretrained(tmp_path)
    file = files["text-classification"]
    found = recommend(base, file, label_column="category", lora_adapter=str(tmp_path), use_cpu=True)
    assert found.to_config().r == found.facts["rank_of_the_adapter"] == 5
    assert found.facts["parameters_of_the_adapter"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert not {name for name in found.arguments() if name.startswith("lora_")} - {"lora_adapter"}


def test_a_model_of_billions_needs_its_config_only(large: str, files: dict[str, str]) -> None:
    start = time.process_time()
    found = recommend(large, files[CAUSAL_LM], use_cpu=True)
    assert time.process_time() - start < 20
    assert found.facts["parameters"] == pytest.approx(8.03e9, rel=0.01)
    rate = found.arguments()["learning_rate"]
    assert 1e-4 <= rate <= 4e-4  # 2e-4 is where others begin
    assert "loraplus_lr_ratio" not in found.arguments()


def test_large_data_get_adapters_with_as_many_parameters_as_tokens(small: str, large: str) -> None:
    """Doubled while they have fewer, up to the highest rank."""
    from datasets import Dataset

    config = LlamaConfig.from_pretrained(large)
    one = parameters_of_a_rank(empty_model(config, large, CAUSAL_LM), parse_arguments([], {}).training.lora_config())
    for rank in (16, 65, 127, 129, 1000):
        found = rank_for(rank * one, one)
        assert RANKS[0] <= found <= RANKS[1]
        assert found >= rank or found == RANKS[1]
        assert found == RANKS[0] or found // 2 < rank
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 3]
    assert one == 32 * sum(map(sum, shapes))
    rows = Dataset.from_dict({"input_ids": [[1] * 1000] * 1500, "labels": [[-100] * 300 + [1] * 700] * 1500})
    parsed = parse_arguments(["--model", "m", "--train-file", "f", "--use-cpu"])
    data = Data(TASKS[CAUSAL_LM], LlamaConfig.from_pretrained(small), None, length=1024, rows={"train": rows})
    assert FEW_TOKENS < 1500 * 700
    said = str(choose(parsed, data))
    assert (parsed.training.lora_r, parsed.training.lora_alpha) == (RANKS[1], RANKS[0])
    assert "--lora-r 256 --lora-alpha 64 (for 1,050,000 trained tokens)" in said


def test_the_rates_are_within_a_factor_of_two_of_the_best_in_our_tables() -> None:
    recipe = (DOCS / "gsm8k.md").read_text(encoding="utf-8")
    found = re.search(r"--learning-rate (\S+) --loraplus-lr-ratio (\d+)", recipe)
    assert found is not None
    assert 0.5 <= rate_for_width(576) / float(found[1]) <= 2
    assert found[2] == "4"
    rows = (DOCS / "banking77.md").read_text(encoding="utf-8").splitlines()
    best = next(line for line in rows if line.startswith("| **")).replace("*", "").split("|")[1:]
    rate, ratio, head = (float(cell) for cell in best[2:5])
    ours = rate_for_classifier(CLASSIFIERS)
    assert 0.5 <= ours / rate <= 2
    assert ratio == 4
    assert 0.5 <= HEAD * ours / head <= 2


@pytest.mark.parametrize(("width", "lowest", "highest"), [(768, 4e-4, 5e-4), (1024, 2e-4, 4e-4)])
def test_the_rates_of_classifiers_are_near_those_of_the_paper(width: int, lowest: float, highest: float) -> None:
    """Hu et al. 2021, table 9: RoBERTa base and large."""
    assert lowest / 2 <= rate_for_classifier(width) <= 2 * highest
