"""The studies on real data at toy sizes: what is trained and evaluated, what is skipped, and the page of results."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OTHERS, TEXTS, bert_of_texts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def load() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("examples", "examples/benchmarks"):
            patch.syspath_prepend(ROOT / folder)
        studies = importlib.import_module("studies")
        patch.setattr(studies, "alone", studies.with_peak)  # not a process for each run
        yield importlib.import_module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(bert_of_texts(tmp_path_factory.mktemp("texts") / "bert"))


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, texts = tmp_path_factory.mktemp("toy"), TEXTS + OTHERS
    lines = ["text,category", *(f"{text},{'ab'[i % 2]}" for i, text in enumerate(texts))]
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    return ["--train-file", str(folder / "train.csv"), "--test-file", str(folder / "test.csv")]


@pytest.fixture(scope="module")
def gsm8k(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder like that of GSM8K, and a language model."""
    from helpers import tiny_llama
    from transformers import AutoTokenizer

    folder, texts = tmp_path_factory.mktemp("gsm8k"), TEXTS + OTHERS
    for name in ("train", "test"):
        rows = [{"question": texts[i % 16], "answer": texts[(3 * i + 1) % 16]} for i in range(700)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_llama().save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "[SEP]"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} [SEP] {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    return folder, folder / "model"


def test_rows_that_choose_settings_are_not_those_of_the_training_or_the_test(load: Any, labeled: list[str]) -> None:
    studies = load("studies")
    rows = {
        "train": [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(40)],
        "test": [{"text": "t", "label": "a"}],
    }
    for per_class in (None, 5):
        train, held = studies.part_of(rows, per_class, True)
        assert not {row["text"] for row in train} & {row["text"] for row in held}
        assert rows["test"][0] not in held
        counts = [sum(row["label"] == label for row in part) for part in (train, held) for label in "ab"]
        assert counts == ([16, 16, 4, 4] if per_class is None else [5, 5, 10, 10])
    train, test = studies.part_of(rows, 5, False)
    assert (len(train), test) == (10, rows["test"])


def test_documents_of_packed_rows_have_the_loss_of_the_packed_rows(load: Any, gsm8k: tuple[Path, Path]) -> None:
    """And of the rows one by one; so full fine-tuning takes the same steps as an adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    studies, (folder, base) = load("studies"), gsm8k
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    assert studies.problems(folder, "train") == studies.problems(folder, "train")
    rows = [studies.answered(tokenizer, chat) for chat in studies.problems(folder, "train")[:5]]
    packed = studies.packed(rows, 64)
    assert sorted(i for ids in packed["input_ids"] for i in ids) == sorted(i for row in rows for i in row["input_ids"])
    batch = studies.Documents()(list(packed))
    with torch.no_grad():
        found = float(model(**batch, num_items_in_batch=1).loss)
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert found / count == pytest.approx(studies.loss_a_token(model, rows), rel=1e-5)


def test_the_comparison_of_methods_trains_each_and_skips_what_is_there(
    load: Any, base: Path, labeled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods, file = load("methods"), tmp_path / "runs.json"
    words = ["--data", "labeled", *labeled, "--base", str(base), "--examples", "2", "--max-steps", "1",
             "--json", str(file), "--rates", "1e-3", "2e-3", "--seeds", "0"]  # fmt: skip
    methods.main([*words, "--minutes", "0"])
    assert not file.exists()
    methods.main([*words, "--methods", "lora", "full"])
    runs = json.loads(file.read_text())
    assert len(runs) == 2 * (2 + 1)
    assert {run["split"] for run in runs} == {"test", "held-out training rows"}
    rates = {run["settings"] for run in runs if run["method"] == "full"}
    assert rates == {"rate=0.0001", "rate=0.0002"}
    for method in ("lora", "full"):
        held = {run["settings"]: run["value"] for run in runs if run["method"] == method and run["split"] != "test"}
        chosen = {run["settings"] for run in runs if run["method"] == method and run["split"] == "test"}
        assert held[chosen.pop()] == max(held.values())
        assert not chosen
    methods.main([*words, "--methods", "lora", "full"])
    assert json.loads(file.read_text()) == runs
    capsys.readouterr()
    methods.main(["--table", "--json", str(file)])
    table = capsys.readouterr().out
    assert "| LoRA | " in table
    assert "| full fine-tuning | " in table
    assert load("records").page(runs).count("\n| bert | ") == 2


@pytest.mark.parametrize(
    ("values", "best", "climbed"),
    [
        ([1, 2, 3, 4, 5], 5, 3), ([5, 4, 3, 2, 1], 1, 4), ([1, 2, 3, 2, 5], 5, 3), ([1, 4, 3, 2, 1], 2, 4),
        ([-math.inf] * 5, None, 5), ([1, 2] + [-math.inf] * 3, 2, 5), ([1, 2, None, 2, 1], None, 1),
        ([None, 2, 3, 2, 1], None, 3),
    ],
)  # fmt: skip
def test_the_best_rate_is_found(load: Any, values: list[float | None], best: int | None, climbed: int) -> None:
    """`climbed`: how many rates are tried from the middle."""
    tried = list[float]()

    def value(rate: float) -> float | None:
        tried.append(rate)
        return values[int(rate) - 1]

    best_of = load("methods").best_of
    assert best_of([1.0, 2.0, 3.0, 4.0, 5.0], value, False) == best
    tried.clear()
    local = best_of([1.0, 2.0, 3.0, 4.0, 5.0], value, True)
    assert len(set(tried)) == climbed
    assert local == best or values == [1, 2, 3, 2, 5] or (values[0] is None and local == 3)


@pytest.mark.slow
def test_each_method_can_be_compared(load: Any, base: Path, labeled: list[str], tmp_path: Path) -> None:
    methods, file = load("methods"), tmp_path / "runs.json"
    methods.main([
        "--data", "labeled", *labeled, "--base", str(base), "--examples", "2", "--max-steps", "1", "--json", str(file),
        "--rates", "1e-3", "--seeds", "0",
    ])  # fmt: skip
    assert {run["method"] for run in json.loads(file.read_text()) if run["split"] == "test"} == {*methods.NAMES}


@pytest.mark.slow
def test_the_comparison_of_methods_on_gsm8k(load: Any, gsm8k: tuple[Path, Path], tmp_path: Path) -> None:
    methods, (folder, base), file = load("methods"), gsm8k, tmp_path / "runs.json"
    words = ["--data", "gsm8k", "--folder", str(folder), "--base", str(base), "--examples", "4", "--max-steps", "1",
             "--json", str(file), "--rates", "1e-3", "--seeds", "0", "--methods"]  # fmt: skip
    methods.main([*words, "lora", "full"])
    runs = json.loads(file.read_text())
    assert [run["method"] for run in runs] == ["lora", "lora", "full", "full"]
    assert all(run["metric"] == "nats a token" and 1 < run["value"] < 10 for run in runs)
    methods.main([*words, "lora", "full", "--bf16"])
    rounded = json.loads(file.read_text())[len(runs) :]
    assert [run["settings"] for run in rounded] == [f"{run['settings']} bf16" for run in runs]
    for run, exact in zip(rounded, runs, strict=True):
        assert run["value"] == pytest.approx(exact["value"], rel=0.01)


@pytest.mark.slow
def test_classifiers_are_compared(load: Any, labeled: list[str], base: Path, tmp_path: Path) -> None:
    classifiers, studies, file = load("classifiers"), load("studies"), tmp_path / "runs.json"
    words = [*labeled, "--label-column", "category", "--per-class", "3", "--epochs", "1", "--json", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "minilm", lambda: base)
        for _ in range(2):
            classifiers.main([*words, "--methods", "hf_lora", "peft_mean", "full_cls", "--options", "use_cpu=True"])
    runs = json.loads(file.read_text())
    assert [run["method"] for run in runs] == ["hf_lora", "peft_mean", "full_cls"]
    assert [run["settings"] for run in runs] == ["epochs=1 use_cpu=True", "epochs=1", "epochs=1"]
    assert all(run["megabytes"] > 100 and run["date"] and run["split"] == "test" for run in runs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_short_answers_are_compared(
    load: Any, gsm8k: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, file, rows = load("answers"), tmp_path / "runs.json", tmp_path / "rows.csv"
    rows.write_text("\n".join(["text,category", *(f"{text},{TEXTS[i % 2]}" for i, text in enumerate(TEXTS))]) + "\n")
    labeled = ["--train-file", str(rows), "--test-file", str(rows)]
    monkeypatch.setattr(answers, "base_folder", lambda: gsm8k[1])
    words = [*labeled, "--label-column", "category", "--per-class", "4", "--limit", "3", "--json", str(file)]
    for _ in range(2):
        answers.main([*words, "--methods", "hf_lora", "peft", "full", "--options", "use_cpu=True"])
    runs = json.loads(file.read_text())
    assert [(run["method"], run["metric"]) for run in runs] == [
        (m, "exact match") for m in ("hf_lora", "peft", "full")
    ]
    assert [run["settings"] for run in runs] == ["use_cpu=True", "rate=0.001", "rate=0.0001"]
    assert all(run["metric"] == "exact match" and 0 <= run["value"] <= 1 for run in runs)


def test_the_page_of_records_is_that_of_the_file(load: Any) -> None:
    records, studies = load("records"), load("studies")
    runs = studies.Runs(studies.RECORDS).all
    assert records.PAGE.read_text(encoding="utf-8") == records.page(runs), "run examples/benchmarks/records.py"
    for run in runs:
        assert run.keys() == {*studies.KEY, "metric", "value", "seconds", "megabytes", "date", "command"}


def test_results_are_ordered_with_their_spread(load: Any) -> None:
    common = {"study": "s", "data": "d", "split": "test", "model": "m", "settings": "", "date": "2026-01-01",
              "command": None, "seconds": None, "megabytes": None}  # fmt: skip
    accurate = [
        common | {"method": name, "seed": seed, "metric": "accuracy", "value": value}
        for name, values in {"a": [0.8, 0.9], "b": [0.95]}.items()
        for seed, value in enumerate(values)
    ]
    losses = [
        common | {"data": "e", "method": name, "seed": 0, "metric": "nats a token", "value": value}
        for name, value in (("c", 1.0), ("d", 0.5))
    ]
    held = accurate[0] | {"method": "held", "split": "held-out training rows", "value": 1.0}
    page = load("records").page([*accurate, *losses, held])
    rows = [line for line in page.splitlines() if line.startswith("| m |")]
    assert [row.split(" | ")[1] for row in rows] == ["b", "a", "d", "c"]
    assert "| 85.00 ± 7.07 | 2 | – |" in rows[1]
    assert "held" not in "".join(rows)
