"""Evaluation and generation make the tokens of training, for every format of rows that `hf-lora train` accepts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lora import (
    ConfigError,
    Conversation,
    DataError,
    LoraModel,
    evaluate,
    finetune,
    generate_answers,
    generate_texts,
    inspect_adapter,
    load_for_generation,
)
from hf_lora.data import classes
from hf_lora.data.chat import chat_rows
from hf_lora.data.formats import recognize_format
from hf_lora.data.tables import read_table
from hf_lora.evaluation import language as evaluation
from hf_lora.generate import texts
from hf_lora.train.build import build_trainer
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.run_data import read_data

SYSTEM = {"role": "system", "content": "please red"}
QUESTIONS, ANSWERS = ["open the door", "close it now", "turn the light on"], ["now", "please the window", "off"]


def pairs(question: str, answer: str, /, **more: Any) -> list[dict[str, Any]]:
    return [{question: q, answer: a, **more} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]


def chats(column: str = "messages", *before: dict[str, str], role: str = "role", text: str = "content") -> Any:
    """Chats of two turns, in the names of one of the two forms of messages."""
    both = zip(QUESTIONS, ANSWERS, strict=True)
    turns = [[("user", q), ("assistant", "it"), ("user", "on"), ("assistant", a)] for q, a in both]
    return [{column: [*before, *({role: r, text: t} for r, t in chat)]} for chat in turns]


@dataclass
class Case:
    """Rows and options of a training; `tokenizer`: "chat" has a template, "plain" has none."""

    rows: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "chat"


LISTS = [{"prompt": chat["messages"][:4], "completion": chat["messages"][4:]} for chat in chats("messages", SYSTEM)]
NAMED = {"text_column": "asked", "completion_column": "told"}
CASES = {
    "pair": Case(pairs("question", "answer")),
    "pair, no template": Case(pairs("question", "answer"), tokenizer="plain"),
    "pair, template off": Case(pairs("question", "answer"), {"use_chat_template": False}),
    "raw": Case(pairs("prompt", "completion")),
    "raw, template on": Case(pairs("prompt", "completion"), {"use_chat_template": True}),
    "named": Case(pairs("asked", "told", text="the a"), NAMED),
    "named, no template": Case(pairs("asked", "told", text="the a"), NAMED, tokenizer="plain"),
    "instruction": Case(pairs("instruction", "output", input="red door")),
    "answer named input": Case(pairs("instruction", "input"), {"completion_column": "input"}),
    "messages": Case(chats("messages")),
    "messages, one system message": Case(chats("messages", SYSTEM)),
    "messages, last turn": Case(chats("messages"), {"last_turn_only": True}),
    "messages in a named column": Case(chats("talk"), {"text_column": "talk"}),
    "conversations": Case(chats("conversations", role="from", text="value")),
    "lists of messages": Case(LISTS),
    "lists of messages as JSON text": Case([{name: json.dumps(cell) for name, cell in row.items()} for row in LISTS]),
    "JSON text of messages before a text": Case(
        [{"prompt": json.dumps([SYSTEM]), "completion": a} for a in ANSWERS], {"max_length": 128}
    ),
    "text": Case(pairs("text", "other")),
    "text, named": Case(pairs("asked", "other"), {"text_column": "asked"}),
    "short": Case(chats("messages"), {"max_length": 9}),
}


@pytest.fixture(scope="module")
def bases(chat_adapter: str, llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases") / "chat"
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_adapter).save_pretrained(folder)
    return {"chat": str(folder), "plain": llama_folder}


def trained(base: str, rows: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of a training whose adapter is saved to a folder."""
    parsed = parse_arguments(
        [],
        {
            "model": base,
            "train_file": str(rows),
            "output_dir": str(out),
            "overwrite": True,
            "use_cpu": True,
            **options,
        },
    )
    data = read_data(parsed)
    build_trainer(parsed, data).save_model()
    return [dict(row) for row in data.rows["train"]]


@dataclass
class Seen:
    """What reaches the model: labeled rows of an evaluation, tokens of prompts in generation."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def taken(self) -> list[list[int]]:
        found, self.prompts = self.prompts, []
        return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def scored(model: Any, rows: list[dict[str, Any]], batch_size: int = 8) -> dict[str, float]:
        found.rows = rows
        return {}

    def answered(model: Any, tokenizer: Any, prompts: list[list[int]], *_: Any) -> list[list[int]]:
        found.prompts += prompts
        return [[] for _ in prompts]

    monkeypatch.setattr(evaluation, "score_rows", scored)
    monkeypatch.setattr(texts, "_answer", answered)
    return found


def assert_prompts_of(rows: list[dict[str, Any]], prompts: list[list[int]], whole: bool) -> None:
    """Each training row begins with its prompt, and what follows it is trained."""
    assert len(prompts) == len(rows)
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        first = len(ids) - 1 if whole else max(t for t in range(1, len(ids)) if labels[t - 1] == -100 != labels[t])
        assert ids[:first] in [prompt[: len(ids)] for prompt in prompts]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_training(name: str, bases: dict[str, str], tmp_path: Path, seen: Seen) -> None:
    case = CASES[name]
    file, adapter = write_lines(tmp_path / "rows.jsonl", case.rows), tmp_path / "adapter"
    rows = trained(bases[case.tokenizer], file, adapter, **case.options)
    model, tokenizer = load_for_generation(adapter)
    evaluate(model, file, tokenizer=tokenizer)
    assert seen.rows == rows
    whole = name.startswith("text")
    if name == "short":
        return
    if not whole:
        evaluate(model, file, tokenizer=tokenizer, generate=True)
        assert_prompts_of(rows, seen.taken(), whole)
    generate_answers(model, file=file, tokenizer=tokenizer)
    assert_prompts_of(rows, seen.taken(), whole)
    if "messages" in name or name == "conversations":
        return
    questions = [f"{q}\n\nred door" if name == "instruction" else q for q in QUESTIONS]
    generate_texts(model, tokenizer, questions)
    assert_prompts_of(rows, seen.taken(), whole)


def test_the_record_is_read_with_merging_and_by_every_command(
    bases: dict[str, str], tmp_path: Path, seen: Seen
) -> None:
    file, adapter = write_lines(tmp_path / "rows.jsonl", pairs("asked", "told")), tmp_path / "adapter"
    rows = trained(bases["chat"], file, adapter, use_chat_template=False, **NAMED)
    for words in (("--generate",), ("--generate", "--merge")):
        run_command("eval", adapter, "--file", file, *words)
        assert_prompts_of(rows, seen.taken(), False)
    for words in (("--file", file), ("--merge", "--file", file), [w for q in QUESTIONS for w in ("--prompt", q)]):
        run_command("generate", adapter, *words)
        assert_prompts_of(rows, seen.taken(), False)
    run_command("eval", adapter, "--file", file, "--merge")
    assert seen.rows == rows
    shown = run_command("inspect", adapter).stdout
    assert "training rows: pair from 'asked', 'told'; without a chat template; separator '\\n'; at most 64" in shown


def test_options_override_the_record(bases: dict[str, str], tmp_path: Path, seen: Seen) -> None:
    rows = pairs("asked", "told", question="the door", answer="red")
    file, adapter = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "adapter"
    trained(bases["chat"], file, adapter, use_chat_template=False, max_length=20, **NAMED)
    tokenizer, table = AutoTokenizer.from_pretrained(adapter), read_table(file)

    def expected(*columns: str, length: int = 20, **options: Any) -> list[dict[str, Any]]:
        return chat_rows(table, recognize_format(table, *columns), tokenizer, length, **options)[0]

    run_command("eval", adapter, "--file", file, "--use-chat-template")
    assert seen.rows == expected("asked", "told", use_chat_template=True)
    words = ("--text-column", "question", "--completion-column", "answer")
    run_command("eval", adapter, "--file", file, *words)
    assert seen.rows == expected("question", "answer", use_chat_template=False)
    run_command("eval", adapter, "--file", file, "--max-length", 5)
    assert seen.rows == expected("asked", "told", length=5, use_chat_template=False)
    run_command("eval", adapter, "--file", file, "--use-chat-template", "--system", "please red")
    with_system = tokenizer.apply_chat_template([SYSTEM, {"role": "user", "content": QUESTIONS[0]}])["input_ids"]
    assert seen.rows[0]["input_ids"][: len(with_system)] == with_system
    with pytest.raises(ConfigError, match="system='red' has no effect on asked\\+told without a chat template"):
        evaluate(adapter, file, system="red")
    run_command("generate", adapter, "--file", file, "--column", "question", "--raw")
    assert seen.taken() == [tokenizer("the door")["input_ids"]] * 3
    run_command("generate", adapter, "--file", file, "--column", "question", "--use-chat-template")
    asked = [{"role": "user", "content": "the door"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert seen.taken() == [prompt["input_ids"]] * 3


def test_a_file_without_the_columns_of_training_is_recognized(
    bases: dict[str, str], tmp_path: Path, seen: Seen
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", pairs("asked", "told"))
    adapter, other = tmp_path / "adapter", write_lines(tmp_path / "other.jsonl", pairs("question", "answer"))
    expected = trained(bases["plain"], rows, adapter, **NAMED)
    evaluate(adapter, other)
    assert seen.rows == expected
    generate_answers(adapter, file=other)
    assert_prompts_of(expected, seen.taken(), False)
    chat = write_lines(tmp_path / "chat.jsonl", chats())
    with pytest.raises(ConfigError, match="needs a chat template"):
        evaluate(adapter, chat)


def test_the_system_message_of_all_chats_is_that_of_a_conversation(bases: dict[str, str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    trained(bases["chat"], write_lines(tmp_path / "rows.jsonl", chats("messages", SYSTEM)), adapter)
    model, tokenizer = load_for_generation(adapter)
    assert Conversation(model, tokenizer).system == SYSTEM["content"]
    assert Conversation(model, tokenizer, system="off").system == "off"
    mixed = [*chats("messages", SYSTEM), *chats("messages")]
    secret = chats("messages", {"role": "system", "content": "Notes are in /home/alice/notes."})
    for rows in (mixed, secret):
        trained(bases["chat"], write_lines(tmp_path / "rows.jsonl", rows), adapter)
        assert "system" not in inspect_adapter(adapter).extras["training_format"]


def test_a_conversation_with_an_adapter_trained_without_the_template_warns(
    bases: dict[str, str], tmp_path: Path, messages: list[str]
) -> None:
    file, adapter = write_lines(tmp_path / "rows.jsonl", pairs("prompt", "completion")), tmp_path / "adapter"
    trained(bases["chat"], file, adapter)
    Conversation(*load_for_generation(adapter))
    assert any("trained without the chat template (raw from 'prompt', 'completion'" in text for text in messages)


def test_a_classification_of_pairs(bert_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"first": q, "second": a, "kind": "ab"[i % 2], "text": "no", "label": 7}
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    file, adapter = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "adapter"
    columns = {"text_column": "first", "pair_column": "second", "label_column": "kind"}
    expected = trained(bert_folder, file, adapter, max_length=5, **columns)
    found: list[Any] = []
    own = classes.classification_rows
    monkeypatch.setattr(classes, "classification_rows", lambda *a: found.append(own(*a)) or found[-1])
    run_command("eval", adapter, "--file", file)
    run_command("eval", adapter, "--file", file, "--max-length", 7, "--pair-column", "text")
    assert found[0] == expected
    assert len(found[1][0]["input_ids"]) == 4
    single = write_lines(tmp_path / "single.jsonl", [{"text": "a", "label": "a"}])
    with pytest.raises(DataError, match=r"trained on pairs of texts, and there is no column 'second'.*pair_column"):
        evaluate(adapter, single)
    with pytest.raises(ConfigError, match="use_chat_template=True has no effect on text-classification"):
        evaluate(adapter, file, use_chat_template=True)
    assert "training rows: classes from 'first', 'second', 'kind'; at most 5 tokens" in str(inspect_adapter(adapter))


def test_evaluation_repeats_the_metrics_of_training(bases: dict[str, str], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", pairs("asked", "told", question="a", answer="b"))
    options = {
        "model": bases["chat"], "train_file": str(file), "test_file": str(file), "output_dir": str(tmp_path / "out"),
        "use_chat_template": False, "max_steps": 2, "learning_rate": 0.05, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    result = finetune({**options, "disable_tqdm": True, **NAMED})
    found = evaluate(tmp_path / "out", file).metrics
    assert found["perplexity"] == pytest.approx(result.metrics["test_perplexity"], rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(result.metrics["test_accuracy"], rel=1e-6)


def test_the_record_stays_with_an_adapter_that_is_loaded_and_saved(bases: dict[str, str], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", pairs("asked", "told"))
    trained(bases["chat"], file, tmp_path / "one", **NAMED)
    LoraModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "hf_lora.json").read_text())["training_format"] for n in ("one", "two"))
    assert one == two
    assert one == {
        "kind": "pair", "text_column": "asked", "completion_column": "told", "use_chat_template": True,
        "last_turn_only": False, "max_length": 64,
    }  # fmt: skip
