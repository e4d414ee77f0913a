"""`hf-lora train` from files to an adapter that loads."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_command
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_lora import ConfigError, LoraModel, finetune
from hf_lora.train.parsing import CHOSEN, DEFAULTS, PACKED, TASK_DEFAULTS, parse_arguments
from hf_lora.train.run_data import read_data
from hf_lora.train.watch import progress

run = functools.partial(run_command, "train")


FAST = ("--num-train-epochs", "1", "--per-device-train-batch-size", "12", "--use_cpu", "--disable-tqdm", "true")


def test_classification_from_csv(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    rows = texts_folder / "rows.csv"
    result = run(
        "--model", bert_folder, "--train-file", rows, "--test_file", rows, "--output-dir", tmp_path / "out",
        "--eval-file", rows, "--lora-r", 4, "--lora_target_modules", "query", "value", "--verbose", *FAST,
    )  # fmt: skip
    assert (
        "text-classification from the columns 'text', 'label': 24 train, 24 eval, 24 test, 2 labels" in result.output
    )
    assert re.search(r"query +32 -> 32 +4 +4 +256\n", result.output)
    assert f"Use it with: hf-lora eval {tmp_path / 'out'} --file FILE\n" in result.output
    assert "MISSING" not in result.output
    assert re.search(r"\n {8,}eval +test\n(.*\n)*accuracy +(\S+) +\2\n", result.output)
    assert (tmp_path / "out" / "eval_results.json").is_file()
    model = LoraModel.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "no", 1: "yes"}
    config = model.lora_configs["default"]
    assert (config.r, set(config.target_modules)) == (4, {"query", "value"})
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "test_results.json").is_file()
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_function_behind_the_command(
    bert_folder: str, texts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    arguments = {
        "model": bert_folder, "train_file": str(texts_folder / "rows.csv"), "output_dir": str(tmp_path / "out"),
        "lora_r": 3, "lora_target_modules": ["query", "value"], "max_steps": 1, "use_cpu": True, "disable_tqdm": True,
        "logging_strategy": "no",
    }  # fmt: skip
    result = finetune(arguments, report=said.append)
    assert result.output_dir == tmp_path / "out"
    assert LoraModel.from_pretrained(tmp_path / "out").lora_configs["default"].r == 3
    [block] = said  # once, before the first step
    for part in (
        "text-classification from the columns",
        "2 labels, 24 rows · LoRA r=3 on 4 layers",
        " trained (",
        "%) · 1 step\n",
    ):
        assert part in block
    assert "trainable" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"finetune\(…\):\n  - lora_rank is not an argument"):
        finetune({**arguments, "lora_rank": 2})


def test_yaml_with_flags_over_it(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {bert_folder}\ntrain_file: {texts_folder / 'rows.jsonl'}\nlearning_rate: 3e-3\nlora_r: 2\n"
        f"lora-alpha: 3\nlora_rank_pattern: {{query: 3}}\nlora_target_modules: [query, key]\nmax_steps: 1\n"
        f"save_strategy: 'no'\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    run("--config", config, "--lora-r", "5")
    model = LoraModel.from_pretrained(tmp_path / "out")
    found = model.lora_configs["default"]
    assert (found.r, found.lora_alpha, found.rank_pattern) == (5, 3.0, {"query": 3})
    parsed = parse_arguments(["--lora-r=5"], config)
    assert (parsed.training.lora_r, parsed.training.learning_rate) == (5, 3e-3)
    assert parsed.training.report_to == []  # ["none"] as TrainingArguments reads it
    assert {"learning_rate", "lora_r", "lora_alpha"} <= parsed.given


def test_the_head_of_another_task_is_trained_too(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    """Also where the checkpoint holds a head for as many labels, so that no parameter is new."""
    AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "other")
    rows = texts_folder / "rows.csv"
    run("--model", tmp_path / "other", "--train-file", rows, "--output-dir", tmp_path / "out", *FAST)
    assert LoraModel.from_pretrained(tmp_path / "out").lora_configs["default"].modules_to_save == ["classifier"]


def test_a_test_file_that_was_trained_on_is_said(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    shutil.copy(texts_folder / "rows.csv", tmp_path / "copy.csv")
    words = ("--model", bert_folder, "--train-file", texts_folder / "rows.csv", "--show-batch", "--use-cpu")
    same = texts_folder / ".." / texts_folder.name / "rows.csv"
    assert "--test-file is the training file: its metrics say nothing" in run(*words, "--test-file", same).stdout
    assert "is the training file" not in run(*words, "--test-file", tmp_path / "copy.csv").stdout


def test_a_decoder_is_trained_as_a_classifier(llama_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    words = ("--model", llama_folder, "--train-file", texts_folder / "rows.csv", "--output-dir", tmp_path / "out")
    said = run(*words, *FAST, "--max-steps", 1).stdout
    assert "the head starts at the class means: loss 0." in said


def test_causal_lm_learns_completions(llama_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    rows = texts_folder / "pairs.jsonl"
    result = run(
        "--model", llama_folder, "--train-file", rows, "--test-file", rows, "--output-dir", tmp_path,
        "--learning-rate", "1e-2", "--save-strategy", "no", *FAST,
    )  # fmt: skip
    assert "prompt+completion: 24 pairs from 'prompt' and 'completion', without a chat template" in result.output
    assert "loss: over the frozen lm_head" in result.output
    assert re.search(r"\n +test\n(.*\n)*accuracy +\S+\nperplexity +\S+\n", result.output)
    with torch.no_grad():
        assert LoraModel.from_pretrained(tmp_path)(torch.tensor([[3, 4]])).logits.shape[:2] == (1, 2)


@pytest.fixture(scope="module")
def chat_folder(chat_adapter: str, llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model with a tokenizer that has a chat template, and a file of chats."""
    folder = tmp_path_factory.mktemp("chat")
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_adapter).save_pretrained(folder)
    (folder / "chats.jsonl").write_text(chats(USER, BOT) * 6)
    return folder


USER = {"role": "user", "content": "open the door"}
BOT = {"role": "assistant", "content": "now please"}


def chats(*messages: dict[str, str]) -> str:
    return json.dumps({"messages": messages}) + "\n"


def test_chats_are_shown_then_learned(chat_folder: Path, tmp_path: Path) -> None:
    words = ("--model", chat_folder, "--train-file", chat_folder / "chats.jsonl", "--output-dir", tmp_path / "out")
    shown = run(*words, "--show-batch").output
    assert "messages: 6 chats from 'messages', 2.0 turns each; loss on the assistant's tokens" in shown
    assert "row 1, document 2: trained 3 of" in shown
    assert "⟦ now please </s>⟧" in shown
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    result = run(*words, "--max-steps", 2, "--use_cpu", "--disable-tqdm", "true", "--packing", "false")
    assert "loss: over the frozen lm_head in chunks of tokens" in result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert LoraModel.from_pretrained(tmp_path / "out").lora_configs["default"].r == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [}\n', "bad.jsonl:\n  - line 1, column 15: Expecting value"),
        ("", "bad.jsonl has no rows"),
        (chats(USER, {**BOT, "role": "asistant"}), "line 1, column 'messages', message 2"),
        (chats(USER), "line 1, column 'messages': there is no assistant message"),
        (
            chats(USER, BOT) + '{"prompt": "a", "completion": "b"}',
            "line 1 fills 'messages', line 2 fills only 'prompt' and 'completion'",
        ),
        (
            chats({**USER, "content": "door " * 80}, BOT),
            "line 1: none of the first 64 of its 86 tokens is trained",
        ),
        (b'{"text": "a"}\n{"text": "\xff"}', "bad.jsonl, line 2: not valid UTF-8"),
        (json.dumps({"words": "a"}), "its columns 'words' match no known format"),
    ],
)  # fmt: skip
def test_bad_chats_are_one_error_with_their_line(
    content: str | bytes, message: str, chat_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = run(
        "--model", chat_folder, "--train-file", tmp_path / "bad.jsonl", "--output-dir", tmp_path / "out", code=2
    ).stderr
    assert message in error
    assert str(tmp_path / "bad.jsonl") in error
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_errors_that_list_the_nearest(tmp_path: Path) -> None:
    stderr = run("--model", "m", "--lora-rr", "4", "--learning-rat=1", "--train-file", "t.csv", code=2).stderr
    assert "--lora-rr is not an argument (did you mean" in stderr
    assert "--lora-r" in stderr
    assert "--learning-rate" in stderr
    config = tmp_path / "run.yaml"
    config.write_text("lora_rank: 4\nlearning_rates: 1\n")
    stderr = run("--config", config, code=2).stderr
    assert "lora_rank is not an argument" in stderr
    assert "'learning_rate'" in stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-file", "t.csv"], "no model"),
        (["--model", "m"], "either --train-file or --dataset"),
        (["--model", "m", "--train-file", "t.csv", "--task", "text-clasification"], "'text-classification'"),
        (["--model", "m", "--train-file", "/nowhere/t.csv"], "/nowhere/t.csv does not exist"),
        (["--model", "m", "--train-file", "t.csv", "--lora-r", "four"], "invalid int value: 'four'"),
        (["--model", "m", "--train-file", "t.csv", "--lora-r", "0"], "must be an integer from 1 to 500000000"),
        (["--model", "m", "--train-file", "t.csv", "--lora-r", "9" * 12], "--lora-r 999999999999 must be an integer"),
        (["--config", "/nowhere/run.yaml"], "could not be read"),
        (["--model", "m", "t.csv"], "t.csv is not an argument: names start with --"),
        (["--load-best-model-at-end", "--eval-strategy", "steps", "--save-strategy", "epoch"], "strategy"),
        (
            ["--model", "m", "--train-file", "t.csv", "--load-best-model-at-end", "--eval-strategy", "epoch"],
            "needs separate evaluation data",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(words: list[str], message: str) -> None:
    assert message in run(*words, "--use-cpu", code=2).stderr


def test_every_default_is_an_argument_and_is_overridden() -> None:
    parsed = parse_arguments(["--warmup-steps", "3", "--per_device_train_batch_size", "2"])
    assert parsed.training.warmup_steps == 3
    assert parsed.training.per_device_train_batch_size == 2
    assert parsed.training.save_total_limit == DEFAULTS["save_total_limit"]
    assert parsed.given == {"warmup_steps", "per_device_train_batch_size"}


def test_yaml_that_is_none(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lora_r: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse_arguments([], config)
    config.write_text("- lora_r")
    with pytest.raises(ConfigError, match="consist of lines"):
        parse_arguments([], config)
    config.write_text("lora_modules_to_save: []\n")
    assert parse_arguments([], config).training.lora_config().modules_to_save == []


def test_no_row_is_longer_than_the_models_positions(bert_folder: str, tmp_path: Path) -> None:
    """The tokenizer of the folder has no limit of its own."""
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{'open the door ' * 99},{label}\n" for label in ("yes", "no") * 4))
    for more in ([], ["--max-length", "999"]):
        out = tmp_path / f"out{len(more)}"
        run("--model", bert_folder, "--train-file", file, "--test-file", file, "--output-dir", out, *FAST, *more)
        assert "test_accuracy" in (out / "test_results.json").read_text()


@pytest.mark.parametrize("task", ["text-classification", "causal-lm", PACKED])
def test_the_listed_defaults_are_those_of_a_run(
    task: str, bert_folder: str, llama_folder: str, texts_folder: Path, tmp_path: Path
) -> None:
    text = re.sub(r"\s+", " ", run("--all-options").stdout)
    base, rows = (bert_folder, "rows.csv") if task == "text-classification" else (llama_folder, "pairs.jsonl")
    words = ["--model", base, "--train-file", str(texts_folder / rows), "--output-dir", str(tmp_path), "--use-cpu"]
    parsed = parse_arguments([*words, *(["--packing", "false"] if task == "causal-lm" else [])])
    read_data(parsed)
    for name in ("learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"):
        listed = re.search(rf"--{name} .*?\(default: ([^)]*)\)", text)
        assert listed is not None
        values = {t: value for part in listed[1].split("; ") for value, t in _of_tasks(part)}
        assert values.keys() == TASK_DEFAULTS.keys()
        assert values[task] == ("by the width" if name == "learning_rate" else f"{getattr(parsed.training, name):g}")
    names = {"text-classification": ("text-classification",), "causal-lm": ("causal-lm",), PACKED: ("causal-lm",)}[
        task
    ]
    for name, words in CHOSEN.items():
        listed = re.search(rf"--{name} .*?\(default: ([^)]*)\)", text)
        assert listed is not None
        assert listed[1] == words
        said = next((part for part in re.split("[;,] ", words) if part.endswith(f"for {names[0]}")), None)
        if said is not None and said.split()[0] not in ("r", "up"):
            assert str(getattr(parsed.training, name)) == said.split()[0]


def _of_tasks(part: str) -> list[tuple[str, str]]:
    value, _, tasks = part.partition(" for ")
    return [(value, task) for task in tasks.split(", ")]


def test_the_progress_bar_has_the_loss_and_the_speed(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    """The speed is that of the tokens of the rows: all of them in each epoch."""
    rows = texts_folder / "rows.csv"
    words = (
        "--model",
        bert_folder,
        "--train-file",
        rows,
        "--output-dir",
        tmp_path,
        "--use-cpu",
        "--save-strategy",
        "no",
    )
    bar = run(*words, "--num-train-epochs", 2, "--per-device-train-batch-size", 8).stderr
    assert re.findall(r"6/6 \[.*, loss 0\.\d+, [\d,]+ tokens/s\]", bar.replace("\r", "\n"))
    assert (
        "loss"
        not in run(
            *words, "--overwrite", "--max-steps", 2, "--disable-tqdm", "true", "--logging-strategy", "no"
        ).stderr
    )


def test_the_speed_is_counted_in_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, state = progress.Progress(1000, "tokens"), SimpleNamespace(
        is_world_process_zero=True, global_step=0, max_steps=10, epoch=1.0
    )  # fmt: skip
    now = [5.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    watch.on_train_begin(None, state, None)  # type: ignore[arg-type]
    shown: list[str] = []
    monkeypatch.setattr(watch.training_bar, "set_postfix_str", shown.append)
    for step in range(1, 11):
        now[0], state.global_step, state.epoch = 5.0 + step / 4, step, 1.0 + step / 5
        watch.before_step(None, None, torch.tensor(step / 100), step)  # type: ignore[arg-type]
        watch.on_step_end(None, state, None)  # type: ignore[arg-type]
    assert shown == [f"loss {step / 100:.3g}, 800 tokens/s" for step in (1, 3, 5, 7, 9, 10)]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_adapter(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    """The launch line of docs/distributed.md; the first process alone prints the results, after the save."""
    (tmp_path / "hf-lora").write_text("from hf_lora.cli import main\nmain()\n")
    words = ["--model", bert_folder, "--train-file", texts_folder / "rows.csv", "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         tmp_path / "hf-lora", "train", *words, "--use-cpu", "--max-steps", "2"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [line for line in done.stdout.splitlines() if line.startswith("trained in")]
    assert len(ends) == 1
    assert "adapter of 0.00 MB" not in ends[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
