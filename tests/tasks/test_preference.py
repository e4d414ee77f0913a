"""`dpo`, `kto` and `reward`: rows in TRL's form, clear errors before the model is loaded, and runs by the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines
from transformers import LlamaConfig

from hf_lora import DataError, LoraModel
from hf_lora.data.preferences import as_trained, joined, read_marked, read_pairs
from hf_lora.data.tables import Table
from hf_lora.data.trained import TrainedFormat
from hf_lora.tasks.base import Asked, Given
from hf_lora.tasks.causal_lm import CausalLM
from hf_lora.tasks.preference import Reward

data_utils = pytest.importorskip("trl.data_utils", reason="the extra chat is not installed")
ASKED, GOOD, BAD = (
    [{"role": role, "content": text}]
    for role, text in (("user", "was it good"), ("assistant", "very good"), ("assistant", "so so"))
)
FAST = (
    "--use-cpu", "--disable-tqdm", "true", "--save-strategy", "no", "--logging-strategy", "steps", "--logging-steps",
    "1", "--max-steps", "3", "--learning-rate", "1e-2", "--per-device-train-batch-size", "4",
)  # fmt: skip


def table(**columns: Any) -> Table:
    rows = len(next(iter(columns.values())))
    return Table("rows.jsonl", columns, [*range(1, rows + 1)], "line")


def only(**cells: Any) -> dict[str, Any]:
    """The row that a table with one row has."""
    (row,) = read_pairs(table(**{name: [cell] for name, cell in cells.items()}))
    return row


def test_every_form_of_a_pair_is_the_same_row() -> None:
    """Prompts given or implied, as TRL extracts them; as messages, as JSON text, or as texts."""
    expected = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    assert data_utils.extract_prompt({"chosen": ASKED + GOOD, "rejected": ASKED + BAD}) == expected
    assert only(chosen=ASKED + GOOD, rejected=ASKED + BAD) == expected
    assert only(chosen=json.dumps(ASKED + GOOD), rejected=json.dumps(ASKED + BAD)) == expected
    assert only(**expected) == expected
    assert only(prompt=ASKED, chosen=ASKED + GOOD, rejected=ASKED + BAD) == expected
    assert only(prompt="was it good", chosen=GOOD, rejected=BAD) == expected
    assert only(prompt=ASKED, chosen="very good", rejected="so so") == expected
    assert joined(expected) == {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    texts = {"prompt": "it was", "chosen": " very good", "rejected": " so so"}
    assert only(**texts) == texts
    assert only(chosen="it was very good", rejected="it was so so") == texts
    assert only(prompt="it was", chosen="it was very good", rejected="it was so so") == texts
    assert only(chosen="it was good", rejected="it was great")["prompt"] == "it was"  # not in the middle of a word
    (chat,) = read_pairs(table(prompt=["was it good"], chosen=["very good"], rejected=["so so"]), as_chat=True)
    assert chat == expected


@pytest.mark.parametrize(
    "answer",
    ['[{"name": "x1"}]', '[{"name": "Anna", "role": "nurse"}]', '[{"from": "Rome", "to": "Paris"}]', "[1, 2]", "[]"],
)
def test_an_answer_that_is_other_json_than_messages_is_a_text(answer: str) -> None:
    pair = {"prompt": "list them", "chosen": answer, "rejected": "no"}
    assert only(**pair) == pair
    (row, _) = read_marked(table(prompt=["a", "b"], answer=[answer, "no"], good=[True, False]), "answer", "good")
    assert row["completion"] == answer


def test_every_row_that_is_not_a_pair_is_listed() -> None:
    cells = [
        (ASKED, GOOD, GOOD, "'chosen' and 'rejected' are equal"), (None, GOOD, BAD, "no common beginning"),
        (ASKED, [{"role": "user", "content": "why"}, *GOOD], BAD, "begins with a user message, and not with 'prompt'"),
        ("why", "", "no", "column 'chosen': the cell is empty"), ("why", "yes", BAD, "must both be texts or both"),
        ("why", 3, "no", "a int instead of a text"), (ASKED, ASKED + GOOD, ASKED, "no answer after the prompt"),
        ("why", [{"role": "robot", "content": "x"}], BAD, "the role 'robot' is unknown"),
        (ASKED, GOOD, BAD, ""),
    ]  # fmt: skip
    prompts, chosen, rejected, faults = map(list, zip(*cells, strict=True))
    with pytest.raises(DataError) as caught:
        read_pairs(table(prompt=prompts, chosen=chosen, rejected=rejected))
    for line, fault in enumerate(faults, 1):
        lines = [text for text in caught.value.faults if text.startswith(f"rows.jsonl, line {line}")]
        assert [fault in text for text in lines] == [True] * bool(fault), (line, lines)


@pytest.mark.parametrize("cells", [[True, False], [1, 0], ["true", "False "], ["1", "0"]])
def test_marks(cells: list[Any]) -> None:
    rows = read_marked(table(prompt=["a", ASKED], answer=["b", "c"], good=cells), "answer", "good")
    assert [row["label"] for row in rows] == [True, False]
    assert rows[1] == {"prompt": ASKED, "completion": [{"role": "assistant", "content": "c"}], "label": False}
    with pytest.raises(DataError, match="line 2, column 'good': 'maybe' is not true or false"):
        read_marked(table(prompt=["a", "b"], answer=["b", "c"], good=[cells[0], "maybe"]), "answer", "good")
    with pytest.raises(DataError, match="'good' is True in every row"):
        read_marked(table(prompt=["a", "b"], answer=["b", "c"], good=cells[:1] * 2), "answer", "good")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from chat_templates import PLAIN, byte_tokenizer
    from helpers import tiny_llama

    folder = str(tmp_path_factory.mktemp("preference") / "base")
    tiny_llama(vocab_size=400, max_position_embeddings=256).save_pretrained(folder)
    byte_tokenizer(PLAIN["chatml"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    pairs = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}] * 6
    marked = [{"prompt": ASKED, "completion": answer, "label": answer is GOOD} for answer in (GOOD, BAD) * 3]
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "marked.jsonl", marked)
    write_lines(folder / "good.jsonl", marked[::2])
    write_lines(folder / "alone.jsonl", [{"prompt": ASKED, "chosen": GOOD}] * 2)
    equal = [{"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}, {"prompt": ASKED, "chosen": GOOD, "rejected": ""}]
    write_lines(folder / "equal.jsonl", equal)
    other = [{"role": "user", "content": "why"}]
    write_lines(folder / "other.jsonl", [{"prompt": ASKED, "chosen": other + GOOD, "rejected": BAD}])
    texts = {"prompt": "why", "chosen": "yes", "rejected": "no"}
    write_lines(folder / "texts.jsonl", [texts, texts])
    write_lines(folder / "mixed.jsonl", [texts, pairs[0], texts])
    write_lines(folder / "swapped.jsonl", [{"prompt": ASKED, "chosen": BAD, "rejected": GOOD}] * 6)
    write_lines(folder / "chats.jsonl", [{"messages": ASKED + GOOD}] * 2)
    return folder


@pytest.mark.parametrize(
    ("task", "file", "metric"),
    [("dpo", "pairs", "rewards/accuracies"), ("kto", "marked", "rewards/margins"), ("reward", "pairs", "accuracy")],
)
def test_the_command_trains_on_preferences(
    task: str, file: str, metric: str, base: str, files: Path, tmp_path: Path
) -> None:
    rows, out = files / f"{file}.jsonl", tmp_path / "out"
    named = () if task == "dpo" else ("--task", task)  # the columns of pairs are DPO's
    said = run_command(
        "train", "--model", base, "--train-file", rows, "--test-file", rows, "--output-dir", out, *named, *FAST
    ).stdout
    plan = run_command("train", "--model", base, "--train-file", rows, "--dry-run", *named, *FAST).stdout
    trained, steps = re.search(r"([\d,]+) trained .* (\d+) steps", said).groups()  # type: ignore[union-attr]
    assert re.search(rf"^{trained} of [\d,]+ parameters would be trained .* in {steps} steps$", plan, re.M)
    assert "and the activations of a batch, which are not forecast" in plan
    shown = run_command("train", "--model", base, "--train-file", rows, "--show-batch", *named, *FAST).stdout
    assert "row 3: " in shown
    assert "was it good" in shown
    results = json.loads((out / "test_results.json").read_text())
    assert results[f"test_{metric}"] > 0
    state = json.loads((out / "trainer_state.json").read_text())
    first = next(entry["loss"] for entry in state["log_history"] if "loss" in entry)
    assert results["test_loss"] < first
    if task == "dpo":
        assert first == pytest.approx(0.693147, abs=1e-5)
    model = LoraModel.from_pretrained(out)
    assert model.config.num_labels == (1 if task == "reward" else 2)
    if task == "reward":
        found = json.loads(run_command("eval", out, "--file", rows, "--json").stdout)
        expected = {name: results[f"test_{name}"] for name in ("accuracy", "margin")}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    else:  # the model answers prompts as it was trained
        answer = run_command("generate", out, "--prompt", "was it good", "--max-new-tokens", "3").stdout
        assert answer.strip()


def test_each_split_has_its_own_metrics(base: str, files: Path, tmp_path: Path) -> None:
    rows = {name: str(files / f"{name}.jsonl") for name in ("pairs", "swapped")}
    words = ("--train-file", rows["pairs"], "--eval-file", rows["pairs"], "--test-file", rows["swapped"])
    said = run_command("train", "--model", base, "--output-dir", tmp_path / "out", *words, *FAST).stdout
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (found["eval_rewards/accuracies"], found["test_rewards/accuracies"]) == (1.0, 0.0)
    assert found["eval_rewards/margins"] == pytest.approx(-found["test_rewards/margins"], rel=1e-4)
    assert not any("eval" in name for name in json.loads((tmp_path / "out" / "test_results.json").read_text()))
    assert "rewards/accuracies" in said


def test_rows_are_shown(base: str, files: Path, tmp_path: Path) -> None:
    words = ("--model", base, "--train-file", files / "pairs.jsonl", "--output-dir", tmp_path / "out")
    shown = run_command("train", *words, "--show-batch").stdout
    assert shown.count("chosen: ⟦") == 3
    assert "rejected: [" in shown
    words = ("--model", base, "--train-file", files / "mixed.jsonl", "--output-dir", tmp_path / "out")
    shown = run_command("train", *words, "--use-chat-template", "true", "--show-batch").stdout
    assert shown.count("chosen: ⟦[{") == 3


WHOLE = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}


@pytest.mark.parametrize(
    ("kind", "answers", "rows"),
    [
        ("chat", "chosen", [{"prompt": ASKED, **WHOLE}, {"prompt": "was it good", **WHOLE}, WHOLE]),
        ("chat", "chosen", [{name: json.dumps(cell) for name, cell in WHOLE.items()}]),
        ("chat", "chosen", [{"prompt": ASKED, "chosen": "very good", "rejected": "so so"}]),
        ("chat", "completion", [{"prompt": "was it good", "completion": GOOD}]),
        ("chat", "completion", [{"prompt": ASKED, "completion": "very good"}]),
        ("raw", "chosen", [{"prompt": "it was", "chosen": "it was very good", "rejected": "it was so so"}]),
    ],
)
def test_an_evaluation_reads_the_rows_of_the_training(
    kind: str, answers: str, rows: list[dict[str, Any]], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is there once, and the answer that training prefers is labeled, in every form of a pair."""
    from chat_templates import PLAIN, byte_tokenizer

    tokenizer, seen = byte_tokenizer(PLAIN["chatml"]), []
    monkeypatch.setattr("hf_lora.evaluation.language.score_rows", lambda model, found, size: seen.append(found) or {})
    trained = TrainedFormat(kind, "prompt", answers, use_chat_template=kind == "chat", separator="")
    given = Given(LlamaConfig(), tokenizer, trained=trained)
    plain = {"prompt": ASKED, answers: GOOD} if kind == "chat" else {"prompt": "it was", answers: " very good"}
    for row in (plain, *rows):
        CausalLM().evaluate(None, table(**{name: [cell] for name, cell in row.items()}), given, Asked())
    assert seen[1:] == seen[:1] * len(rows)
    other = table(prompt=[ASKED], chosen=[ASKED + GOOD], rejected=[ASKED + BAD])
    assert as_trained(other, replace(trained, last_turn_only=False)) is other  # that of causal-lm on the same columns


def test_a_reward_model_is_not_evaluated_on_texts_beside_messages() -> None:
    from chat_templates import PLAIN, byte_tokenizer

    rows = table(prompt=["it was", ASKED], chosen=["very good", GOOD], rejected=["so so", BAD])
    given = Given(LlamaConfig(), byte_tokenizer(PLAIN["chatml"]), trained=TrainedFormat(use_chat_template=False))
    with pytest.raises(DataError, match="line 1: this row holds texts"):
        Reward().evaluate(None, rows, given, Asked())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "dpo", "--train-file", "alone.jsonl"], "pairs need the columns 'chosen' and 'rejected'"),
        (["--train-file", "equal.jsonl"], "line 1: 'chosen' and 'rejected' are equal"),
        (["--train-file", "equal.jsonl"], "line 2, column 'rejected': the cell is empty"),
        (["--train-file", "other.jsonl"], "and not with 'prompt'"),
        (["--train-file", "mixed.jsonl"], "line 3: this row holds texts"),
        (["--train-file", "pairs.jsonl", "--test-file", "texts.jsonl"], "texts.jsonl, line 1: this row holds texts"),
        (["--task", "reward", "--train-file", "chats.jsonl"], "pairs need the columns 'chosen' and 'rejected'"),
        (["--task", "kto", "--train-file", "good.jsonl"], "'label' is True in every row"),
        (["--train-file", "chats.jsonl", "--beta", "0.2"], "--beta has no effect on the task causal-lm"),
        (
            ["--task", "reward", "--train-file", "pairs.jsonl", "--beta", "0.2"],
            "--beta has no effect on the task reward; it is for dpo, kto",
        ),
        (["--train-file", "pairs.jsonl", "--metric-for-best-model", "accuracy"], "rewards/accuracies"),
        (["--train-file", "pairs.jsonl", "--beta", "-0.5"], "--beta -0.5 must be greater than 0"),
        (
            ["--task", "kto", "--train-file", "marked.jsonl", "--per-device-train-batch-size", "1"],
            "Pass --per-device-train-batch-size 2",
        ),
    ],
)
def test_mistakes_are_one_message_before_the_model_is_loaded(
    words: list[str], message: str, base: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr("hf_lora.train.build.load_base", lambda *args, **options: pytest.fail("loaded"))
    result = run_command("train", "--model", base, "--output-dir", tmp_path / "out", *words, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
