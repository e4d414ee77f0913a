"""`--learning-rate auto`: the rate that a slow computation finds too, and the run that its number would give."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command, write_lines
from safetensors.torch import load_file
from tiny import OTHERS, TEXTS, bert_of_texts
from transformers import LlamaConfig

import hf_lora
from hf_lora import ConfigError
from hf_lora.tasks.base import Data
from hf_lora.tasks.registry import CAUSAL_LM, TASKS
from hf_lora.train import search
from hf_lora.train.defaults import RATE, head_rate
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.run_data import read_rows
from hf_lora.train.search import FACTORS, FILE, RUNGS, Trial, describe, search_learning_rate

TRIALS = sum(count for _, count in RUNGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(0)
    words = sorted({word for text in TEXTS + OTHERS for word in text.split()})
    lines = []
    for _ in range(80):
        text = " ".join(source.choices(words, k=5))
        lines.append({"text": text, "label": "yes" if "dog" in text or "cat" in text or "sun" in text else "no"})
    return Path(write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines))


def arguments(base: str, rows: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": base, "train_file": str(rows), "output_dir": str(out), "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": "auto",
        **more,
    }  # fmt: skip


def test_auto_gives_the_run_of_the_rate_that_it_finds(base: str, rows: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = hf_lora.finetune(arguments(base, rows, tmp_path / "auto"), lines.append)
    rate = next(
        float(line.split()[2].rstrip(",")) for line in lines[0].splitlines() if line.startswith("learning rate")
    )
    kept = next(iter(json.loads((tmp_path / "auto" / FILE).read_text()).values()))
    assert len(kept) == TRIALS
    last = {key: trial["loss"] for key, trial in kept.items() if key.endswith("/4")}
    assert f"{rate:g}/4" == min(last, key=last.__getitem__)
    first = sorted((trial["loss"], key) for key, trial in kept.items() if key.endswith("/8"))
    assert {key.split("/")[0] for _, key in first[:2]} == {key.split("/")[0] for key in last}
    assert rate in [pytest.approx(RATE * factor) for factor in FACTORS]
    hf_lora.finetune(arguments(base, rows, tmp_path / "given", learning_rate=rate))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("auto", "given"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found.metrics == {}


def test_an_interrupted_search_goes_on(base: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lora.train.run_data import read_data

    tried: list[float] = []
    own = search._Runner.run

    def counted(self: Any, rate: float, divisor: int) -> Trial:
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append(rate)
        return own(self, rate, divisor)

    def searched(out: Path, **more: Any) -> list[Trial]:
        parsed = parse_arguments([], arguments(base, rows, out, **more))
        return search_learning_rate(parsed, read_data(parsed))

    monkeypatch.setattr(search._Runner, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "out")
    monkeypatch.setattr(search._Runner, "run", lambda *args: tried.append(args[1]) or own(*args))
    again = searched(tmp_path / "out")
    assert len(tried) == TRIALS
    assert searched(tmp_path / "whole") == again  # as if it had not been interrupted
    tried.clear()
    searched(tmp_path / "out")
    assert not tried
    searched(tmp_path / "out", seed=3)  # another run
    assert len(tried) == TRIALS
    few = searched(tmp_path / "few", max_steps=3)  # each round is longer than the one before
    assert [trial.steps for trial in few] == [2] * 5 + [4] * 2


def test_ctrl_c_says_that_the_trials_are_kept(
    base: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, rate: float, divisor: int) -> Trial:
        if rate > RATE:
            raise KeyboardInterrupt
        return Trial(rate, 80 // divisor, 1.0)

    monkeypatch.setattr(search._Runner, "run", run)
    given = arguments(base, rows, tmp_path / "out")
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    said = run_command("train", *words, code=130).stderr
    assert f"{tmp_path / 'out' / FILE}; the same command goes on" in " ".join(said.split())
    assert "nothing was saved" not in said


def test_other_rows_in_the_same_file_are_searched_anew(base: str, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    keys = []
    for text in (rows.read_text(), rows.read_text().replace("dog", "cat")):
        file.write_text(text)
        parsed = parse_arguments([], arguments(base, file, tmp_path / "out"))
        keys.append(search._Store(tmp_path / FILE, parsed, read_rows(parsed, writes=False))._key)
    assert keys[0] != keys[1]


def test_initializations_that_look_at_batches_are_refused(base: str, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-init eva looks at batches"):
        hf_lora.finetune(arguments(base, rows, tmp_path / "out", lora_init="eva"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_fewer_held_out_rows_than_a_batch(base: str, rows: Path, tmp_path: Path) -> None:
    """They are evaluated whole, also if the training drops its last batch."""
    more = {"dataloader_drop_last": True, "max_steps": 16}
    lines: list[str] = []
    hf_lora.finetune(arguments(base, rows, tmp_path / "out", **more), lines.append)
    assert "by the loss on held-out rows" in lines[0]


@pytest.mark.parametrize(
    ("file", "words", "rate"),
    [
        ("auto", [], None), ("auto", ["--learning-rate", "1e-3"], 1e-3), ("1e-3", ["--learning-rate=auto"], None),
        ("1e-3", ["--learning_rate", "2e-3"], 2e-3),
    ],
)  # fmt: skip
def test_the_last_rate_counts(file: str, words: list[str], rate: float | None) -> None:
    """Flags override a file, whether it has a number or `auto`."""
    parsed = parse_arguments(words, {"model": "m", "learning_rate": file})
    assert parsed.run.search_learning_rate == (rate is None)
    assert rate is None or parsed.training.learning_rate == rate


@pytest.mark.parametrize("words", [[], ["--learning-rate", "1e-3"]])
def test_a_search_that_is_asked_for_by_its_own_name_stays(words: list[str]) -> None:
    """It is around the rate that is given."""
    parsed = parse_arguments(words, {"model": "m", "search_learning_rate": True, "learning_rate": 1e-3})
    assert parsed.run.search_learning_rate
    assert parsed.training.learning_rate == 1e-3


def test_a_rate_that_diverges_loses(base: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lora.train.run_data import read_data

    losses = dict(zip(FACTORS, (1.0, 0.5, 0.7, float("inf"), float("inf")), strict=True))
    monkeypatch.setattr(
        search._Runner, "run", lambda self, rate, divisor: Trial(rate, 80 // divisor, losses[round(rate / RATE, 3)])
    )
    words = parse_arguments([], arguments(base, rows, tmp_path / "out"))
    data = read_data(words)
    search_learning_rate(words, data)
    assert words.training.learning_rate == pytest.approx(RATE / 2)
    assert data.lines[-1].startswith("learning rate 0.00025")
    assert "0.001: diverged" in data.lines[-1]
    assert words.training.head_learning_rate == head_rate(words.training.learning_rate)
    words = parse_arguments([], arguments(base, rows, tmp_path / "head", head_learning_rate=0.01))
    search_learning_rate(words, read_data(words))
    assert (words.training.learning_rate, words.training.head_learning_rate) == (pytest.approx(RATE / 2), 0.01)
    losses.update(dict.fromkeys(losses, float("inf")))
    words = parse_arguments([], arguments(base, rows, tmp_path / "none"))
    with pytest.raises(ConfigError, match="diverged with every rate"):
        search_learning_rate(words, read_data(words))


def test_the_end_of_the_range_is_said() -> None:
    trials = [Trial(1.0, 5, 0.2), Trial(2.0, 5, 0.3)]
    assert "end of the range" in describe(trials, trials[0])
    assert "end of the range" not in describe([*trials, Trial(0.5, 5, 0.9)], trials[0])


def test_few_rows_and_a_word_that_is_not_auto_are_refused(base: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "few.jsonl", [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(TEXTS)])
    common = ("train", "--model", base, "--train-file", file, "--output-dir", tmp_path / "out", "--use-cpu")
    said = run_command(*common, "--learning-rate", "auto", code=2).stderr
    assert "at least 20 rows" in said
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "invalid float value" in run_command(*common, "--learning-rate", "best", code=2).stderr
    for words in (["--learning-rate=auto"], ["--learning_rate", "auto"], ["--search-learning-rate"]):
        assert parse_arguments(["--model", "m", *words, "--seed", "3"]).run.search_learning_rate


def test_it_is_refused_where_lora_muon_trains_everything(tmp_path: Path) -> None:
    parsed = parse_arguments(["--model", "m", "--learning-rate", "auto", "--muon-learning-rate", "0.02"])
    data = Data(TASKS[CAUSAL_LM], LlamaConfig(), None, length=8, rows={"train": [{}] * 30})
    with pytest.raises(ConfigError, match="nothing to train beside --muon-learning-rate"):
        search_learning_rate(parsed, data)


def test_every_process_reads_the_trials_of_the_first(
    base: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a search may be on the first node alone; another process would train what it waits for."""
    parsed = parse_arguments([], arguments(base, rows, tmp_path / "here"))
    data = Data(TASKS[CAUSAL_LM], LlamaConfig(), None, rows={"train": [{"input_ids": [1]}]})
    first = {"0.0005/8": {"steps": 10, "loss": 1.0}}
    monkeypatch.setattr(search, "of_all_ranks", lambda mine: [first, mine])
    assert search._Store(tmp_path / "nowhere" / FILE, parsed, data).find(5e-4, 8) == Trial(5e-4, 10, 1.0)
