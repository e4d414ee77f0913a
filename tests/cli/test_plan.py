"""`hf-lora init`, `targets`, `env` and `train --print-config`, and the number of threads."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import run_command as run
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_lora import ConfigError, LoraConfig, explain_targets, recommend
from hf_lora.cli import threads
from hf_lora.cli.threads import Times, threads_of
from hf_lora.tasks.registry import TASKS
from hf_lora.train.defaults import chooses
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.template import as_yaml, template
from hf_lora.train.watch import slowdown
from hf_lora.train.watch.slowdown import Slowdown

ARGUMENTS = [
    "--model m --train-file t.csv",
    "--model m --lora-target-modules query value --lora-rank-pattern '{\"query\": 3}' --lora-r 4",
    "--learning-rate 1e-3 --packing false --warmup-steps 3 --eval-strategy steps --seed 7",
    "--report-to none --optim sgd --label-column 'a: b' --lora-modules-to-save none --use-cpu",
    "--no-packing --save-steps 5 --no-remove-unused-columns",
    "--overwrite --lora-bias all --lora-init false --max-steps 9 --label-names x y",
]


# Files of options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ARGUMENTS)
def test_the_printed_configuration_gives_the_same_arguments(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    parsed, file = parse_arguments(words), tmp_path / "run.yaml"
    file.write_text(as_yaml(parsed))
    again = parse_arguments([], file)
    assert again.run == parsed.run
    for field in dataclasses.fields(parsed.training):
        assert getattr(again.training, field.name) == getattr(parsed.training, field.name), field.name
    assert parsed.given == again.given, "a default that counts as given is not adapted to the run"
    assert run("train", *words, "--print-config").stdout == file.read_text()


def test_the_printed_configuration_fixes_nothing_that_was_left_open(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(parse_arguments(["--model", "m", "--no-packing"])))
    assert yaml.safe_load(file.read_text()) == {"model": "m", "packing": False}
    found = parse_arguments(["--save-steps", "1", "--logging-steps", "1"], file)
    assert found.given == {"model", "packing", "save_steps", "logging_steps"}
    assert found.training.save_strategy == found.training.logging_strategy == "steps"


def test_an_interval_on_the_command_line_overrides_the_strategy_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("save_strategy: epoch\nlogging_strategy: epoch\neval_strategy: epoch\neval_file: e.csv\n")
    training = parse_arguments(["--save-steps", "1", "--logging-steps=2", "--eval-strategy", "epoch"], file).training
    assert (training.save_strategy, training.logging_strategy, training.eval_strategy) == ("steps", "steps", "epoch")
    both = parse_arguments(["--save-steps", "1", "--save-strategy", "epoch", "--eval-steps", "3"], file).training
    assert (both.save_strategy, both.logging_strategy, both.eval_strategy) == ("epoch", "epoch", "steps")
    file.write_text("save_strategy: epoch\nsave_steps: 4\n")
    assert parse_arguments([], file).training.save_strategy == "epoch"


@pytest.mark.parametrize("task", TASKS)
def test_the_template_is_valid_also_with_every_comment_removed(task: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert f"hf-lora train --config {file}" in run("init", task, file, "--model", "user/model").stdout
    text = file.read_text()
    plain = parse_arguments([], file)
    assert (plain.run.model, plain.run.task) == ("user/model", task)
    left_to_the_run = {"lora_r", "learning_rate", "num_train_epochs"} - plain.given
    assert len(left_to_the_run) == (3 if chooses(TASKS[task]) else 0)
    ranks = {"text-classification": 32, "multi-label-classification": 32, "causal-lm": 64}
    assert f"lora_r: {ranks.get(task, 8)}" in text
    lines = [line[1:] if line[:1] == "#" and line[1:2].isalpha() else line for line in text.splitlines()]
    (tmp_path / "all.yaml").write_text("\n".join(lines))
    whole = parse_arguments([], tmp_path / "all.yaml")
    assert whole.given > plain.given
    assert all(yaml.safe_load(template(task)).keys() <= parsed.given for parsed in (plain, whole))
    assert max(map(len, text.splitlines())) <= 110
    assert f"{file} exists" in run("init", task, file, code=2).stderr
    assert file.read_text() == text
    assert "cannot be written" in run("init", task, file / "below.yaml", code=2).stderr


def test_a_template_trains(bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    run("init", "text-classification", tmp_path / "run.yaml", "--model", bert_folder)
    rows = texts_folder / "rows.csv"
    words = ("--train-file", rows, "--test-file", rows, "--output-dir", tmp_path / "out", "--max-steps", 1)
    run("train", "--config", tmp_path / "run.yaml", *words, "--use-cpu", "--disable-tqdm", "true")
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_template_of_data_has_the_settings_that_a_run_would_choose(
    bert_folder: str, texts_folder: Path, tmp_path: Path
) -> None:
    rows, file = str(texts_folder / "rows.csv"), tmp_path / "run.yaml"
    words = ("--model", bert_folder, "--data", rows, "--use-cpu", "--max-length", 16)
    run("init", "text-classification", file, *words)
    found = recommend(bert_folder, rows, "text-classification", use_cpu=True, max_length=16)
    written = yaml.safe_load(file.read_text())
    assert written == {**found.arguments(), "output_dir": "my-adapter"}
    text = file.read_text()
    assert all(f"{each.reason[1:]}:\n{next(iter(each.values))}: " in text for each in found.settings)
    assert "--data needs --model" in run("init", "causal-lm", tmp_path / "x", "--data", rows, code=2).stderr
    assert "--lora-r 4: these options" in run("init", "causal-lm", tmp_path / "x", "--lora-r", 4, code=2).stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--lr-scheduler-type", "cosine", "--optim", "adamw_torch", "--save-strategy", "no"),
        ("--report-to", "none", "--lora-init-config", '{"rho": 1.5}', "--lora-init", "eva"),
        ("--accelerator-config", '{"split_batches": true}', "--text-column", "no", "--label-column", "01"),
    ],
)
def test_a_template_of_data_is_read_as_it_was_given(words: tuple[str, ...], bert_folder: str, tmp_path: Path) -> None:
    """Enumerations, objects and words that mean something else in YAML."""
    rows, file = tmp_path / "röws 🙂.jsonl", tmp_path / "run.yaml"
    lines = [{"no": text, "01": label} for text, label in (("a dog", "x"), ("a cat", "y"))] * 4
    rows.write_text("\n".join(map(json.dumps, lines)))
    words = words if "01" in words else (*words, "--text-column", "no", "--label-column", "01")
    run("init", "text-classification", file, "--model", bert_folder, "--data", rows, *words, "--use-cpu")
    given = parse_arguments(["--task=text-classification", f"--model={bert_folder}", f"--train-file={rows}", *words])
    again = parse_arguments([], file)
    for name in given.given:
        source = "run" if hasattr(given.run, name) else "training"
        ours, theirs = (getattr(getattr(parsed, source), name) for parsed in (again, given))
        assert ours == theirs or vars(ours) == vars(theirs), name


def test_an_unknown_task_names_the_known_ones() -> None:
    message = run("init", "text-clasification", code=2).stderr
    assert "did you mean 'text-classification'" in message
    with pytest.raises(ConfigError, match="causal-lm"):
        template("chat")


# What would be adapted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "auto"),
    [
        ("bert", None, AutoModel), ("bert", "text-classification", AutoModelForSequenceClassification),
        ("llama", None, AutoModelForCausalLM), ("llama", "causal-lm", AutoModelForCausalLM),
        ("llama", "text-classification", AutoModelForSequenceClassification),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"r": 3, "target_modules": "attention"}, {"bias": "lora_only"}])
def test_targets_are_those_of_the_loaded_model(
    kind: str, task: str | None, auto: Any, options: dict[str, Any], bert_folder: str, llama_folder: str
) -> None:
    folder = bert_folder if kind == "bert" else llama_folder
    words = [f"--lora-{name.replace('_', '-')}={value}" for name, value in options.items()]
    found = run("targets", folder, *(["--task", task] if task else []), *words).stdout
    plan = explain_targets(auto.from_pretrained(folder), LoraConfig(**options))
    rows = [line for line in str(plan).splitlines() if "not in the base checkpoint" not in line]
    for line in rows:
        assert line in found
    assert all(f"  {path}: " in found for path in plan.saved)


def test_what_cannot_be_adapted_names_a_command_that_works(bert_folder: str, adapter_folder: str) -> None:
    message = run("targets", bert_folder, "--lora-target-modules", "nothing", code=2).stderr
    assert "`hf-lora targets MODEL` lists what can be adapted." in message
    assert "13 layers" in run("targets", bert_folder).stdout
    assert f"--lora-adapter {adapter_folder}" in run("targets", adapter_folder, code=2).stderr
    assert "its config could not be loaded" in run("targets", "no-such/model", code=2).stderr


def test_env_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    text = run("env").stdout
    assert torch.__version__ in text
    assert "hf_secret" not in text
    assert any(line.split() == ["OMP_NUM_THREADS", "7"] for line in text.splitlines())


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [(2, 0.0, 2), (2, 0.3, 2), (2, 1.0, 1), (2, 1.9, 1), (2, 7.0, 1), (8, 2.6, 5), (1, 1.0, 1), (8, -0.2, 8)],
)
@pytest.mark.parametrize("own", [0.0, 0.8])
def test_as_many_threads_as_cores_are_free(cores: int, others: float, expected: int, own: float) -> None:
    before, seconds = Times(10.0, 100.0, 3.0), 4.0
    after = Times(10.0 + seconds, 100.0 + (others + own) * seconds, 3.0 + own * seconds)
    assert threads_of(cores, before, after)[0] == expected


@pytest.mark.parametrize("setting", [None, "OMP_NUM_THREADS"])
def test_a_busy_machine_is_said_and_the_users_choice_is_kept(
    setting: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "2")
    readings = iter([Times(0.0, 0.0, 0.0), Times(4.0, 8.0, 4.0)])
    monkeypatch.setattr(threads, "times", lambda: next(readings))
    monkeypatch.setattr(threads, "_cores", lambda: [0, 1])
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with threads.threads_for_free_cores():
        pass
    assert chosen == ([1] if setting is None else [])
    said = capsys.readouterr().err
    assert ("Other programs use 1 of 2 cores, so this one computes with 1 thread." in said) is (setting is None)


def test_the_times_of_this_machine() -> None:
    first = threads.times()
    sum(i * i for i in range(300_000))
    second = threads.times()
    assert first is not None
    assert second is not None
    assert second.wall > first.wall
    assert second.own >= first.own
    assert second.busy >= first.busy - 0.05


@pytest.mark.parametrize(("later", "warned"), [(0.2, False), (0.5, True)])
def test_steps_that_become_slower_say_why(
    later: float, warned: bool, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(slowdown.time, "perf_counter", lambda: now[0])
    watch, state = Slowdown(), SimpleNamespace(is_world_process_zero=True, global_step=0)
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    watch.on_train_begin(args, state, None)  # type: ignore[arg-type]
    for step in range(40):
        watch.on_step_begin(args, state, None)  # type: ignore[arg-type]
        now[0] += 1.0 if step < 2 else 0.12 if step < 15 else later
        state.global_step += 1
        watch.on_step_end(args, state, None)  # type: ignore[arg-type]
    assert len(messages) == warned
    assert not warned or "OMP_NUM_THREADS=1" in messages[0]


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("train", "eval", "generate", "chat", "merge", "push", "pull", "inspect", "convert", "targets"):
        assert command in text
