"""Rows of every form become chats with labels, and those that cannot be labeled are listed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATS, FORGETS, PLAIN, byte_tokenizer, chat

from hf_lora.data.chat import chat_rows, is_templated, label_chat, label_pair, show_batch
from hf_lora.data.formats import recognize_format
from hf_lora.data.prompts import read_answered, read_prompts
from hf_lora.data.tables import Table, read_table
from hf_lora.data.trained import TrainedFormat
from hf_lora.errors import ConfigError, DataError


def rows_of(columns: dict[str, list[Any]], tokenizer: Any, max_length: int = 1000, **options: Any) -> Any:
    count = len(next(iter(columns.values())))
    table = Table("a.jsonl", columns, list(range(1, count + 1)), "line", {})
    return chat_rows(table, recognize_format(table), tokenizer, max_length, **options)


def test_every_form_becomes_rows(bytes_: Any) -> None:
    bytes_.chat_template = PLAIN["chatml"]
    one = label_chat(bytes_, chat(CHATS["one"]))
    messages = chat(CHATS["one"])
    for columns in (
        {"messages": [messages]},
        {"conversations": [[{"from": "human", "value": "Hello, world."}, {"from": "gpt", "value": "Hello!"}]]},
        {"prompt": [messages[:1]], "completion": [messages[1:]]},
        {"question": ["Hello, world."], "answer": ["Hello!"]},
        {"instruction": ["Hello, world."], "response": ["Hello!"]},
    ):
        assert rows_of(columns, bytes_) == ([{"input_ids": one[0], "labels": one[1]}], 0)
    raw = {"prompt": ["Hello, world."], "completion": ["Hello!"]}
    assert rows_of(raw, bytes_)[0][0]["labels"] == label_pair(bytes_, "Hello, world.", "Hello!")[1]
    assert rows_of(raw, bytes_, use_chat_template=True)[0][0]["labels"] == one[1]
    pair = {"instruction": ["Say"], "input": ["it."], "output": ["Hello!"]}
    plain = rows_of(pair, bytes_, use_chat_template=False)[0][0]["input_ids"]
    assert bytes_.decode(plain) == "Say\n\nit.\nHello!</s>"
    bytes_.chat_template = None
    assert rows_of(pair, bytes_)[0][0]["input_ids"] == plain
    assert bytes_.decode(rows_of({"text": ["Say"]}, bytes_)[0][0]["labels"]) == "Say</s>"


def test_the_template_is_asked_for_where_there_is_one_to_use(bytes_: Any) -> None:
    def form(**columns: list[Any]) -> Any:
        return recognize_format(Table("a.jsonl", columns, [1], "line", {}))

    bytes_.chat_template = PLAIN["chatml"]
    pair, text, messages = form(question=["a"], answer=["b"]), form(text=["a"]), form(messages=[chat(CHATS["one"])])
    assert [is_templated(pair, bytes_, use) for use in (None, True, False)] == [True, True, False]
    assert not is_templated(text, bytes_)
    with pytest.raises(ConfigError, match="holds texts without turns"):
        is_templated(text, bytes_, True)
    with pytest.raises(ConfigError, match="need the template"):
        is_templated(messages, bytes_, False)
    bytes_.chat_template = None
    assert not is_templated(pair, bytes_)
    for bad in (pair, messages):
        with pytest.raises(ConfigError, match="the tokenizer has none"):
            is_templated(bad, bytes_, True)


def test_long_rows_are_cut_and_those_that_lose_their_answer_are_listed(bytes_: Any) -> None:
    bytes_.chat_template = PLAIN["chatml"]
    short, long = chat(CHATS["one"]), chat([("user", "a" * 50), ("assistant", "b")])
    size = len(label_chat(bytes_, short)[0])
    rows, cut = rows_of({"messages": [short, short]}, bytes_, max_length=size - 2)
    assert (cut, [len(row["input_ids"]) for row in rows]) == (2, [size - 2] * 2)
    count = len(label_chat(bytes_, long)[0])
    with pytest.raises(DataError) as error:
        rows_of({"messages": [short, long, long]}, bytes_, max_length=40)
    lines = [f"a.jsonl, line {n}: none of the first 40 of its {count} tokens is trained" for n in (2, 3)]
    assert all(line in str(error.value) for line in lines)
    assert "line 1:" not in str(error.value)
    assert "Raise max_length" in str(error.value)


def test_rows_that_cannot_be_labeled_are_listed_with_their_lines(bytes_: Any, tmp_path: Path) -> None:
    bytes_.chat_template = FORGETS
    thought = "<think>2</think>4"
    twice = chat([("user", "2+2?"), ("assistant", thought), ("user", "sure?"), ("assistant", "4")])
    first = chat([("assistant", "a")])
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"messages": m}) for m in (chat(CHATS["one"]), twice, first)), "utf-8")
    table = read_table(file)
    with pytest.raises(DataError) as error:
        chat_rows(table, recognize_format(table), bytes_, 1000)
    assert f"{file}, line 2: message 2: the template rewrites earlier turns" in str(error.value)
    assert f"{file}, line 3: message 1: the assistant message is the first" in str(error.value)
    assert "line 1:" not in str(error.value)
    assert "last_turn_only" in str(error.value)
    with pytest.raises(DataError, match=r"^the tokenizer has no EOS token") as error:
        rows_of({"text": ["a", "b"]}, byte_tokenizer(eos=None))
    assert str(error.value).count("no EOS token") == 1
    empty = Table("a.jsonl", {"text": []}, [], "line", {})
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        chat_rows(empty, recognize_format(empty), bytes_, 10)


def test_a_row_in_which_nothing_is_learned_is_an_error(bytes_: Any) -> None:
    """A row of one token has none that another predicts."""
    with pytest.raises(DataError, match=r"line 2: none of its tokens is trained \(all labels are ignored\)"):
        rows_of({"text": ["ab", "</s>"]}, bytes_)


def test_a_template_without_closing_token_is_told_once(bytes_: Any) -> None:
    bytes_.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.warns(UserWarning, match="may not learn to stop") as told:
        rows, _ = rows_of({"messages": [chat(CHATS["one"])] * 2}, bytes_)
    assert len(told) == 1
    assert bytes_.decode([label for label in rows[0]["labels"] if label != -100]) == "Hello!"
    bytes_.chat_template = PLAIN["chatml"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of({"messages": [chat(CHATS["one"])]}, bytes_)


def test_a_batch_is_shown_with_what_is_learned(bytes_: Any) -> None:
    bytes_.chat_template = PLAIN["chatml"]
    ids, labels = label_chat(bytes_, chat([("user", "日本"), ("assistant", "Hello!")]))
    learned = sum(label != -100 for label in labels)
    line = f"trained {learned} of {len(ids)} tokens"
    text = "<|im_start|>user\n日本<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
    pad, more = bytes_.pad_token_id, len(ids) + 2
    padded = {
        "input_ids": torch.tensor([ids + [pad] * 2, [*ids, *ids[:2]]]),
        "labels": torch.tensor([labels + [-100] * 2, [*labels, *ids[:2]]]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * 2, [1] * more]),
    }
    tail = f"⟦{bytes_.decode(ids[:2])}⟧"
    expected = f"row 1: {line}\n{text}\nrow 2: trained {learned + 2} of {more} tokens\n{text}{tail}"
    assert show_batch(bytes_, padded) == expected
    count = len(ids)
    packed = {
        "input_ids": torch.tensor([[*ids, *ids, pad, pad]]),
        "labels": torch.tensor([[*labels, *labels, -100, -100]]),
        "position_ids": torch.tensor([[*range(count), *range(count), 0, 0]]),
    }
    documents = [f"row 1, document {n}: {line}\n{text}" for n in (1, 2)]
    assert show_batch(bytes_, packed) == "\n".join(documents)


TONES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "[[{{ (tone | default('')) + m['content'] + '<|im_end|>' }}]]{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_variables_of_a_row_reach_its_template(marked: bool, text: bool, bytes_: Any) -> None:
    """Null is as if the row did not have the variable; the reference is transformers' rendering of each row."""
    begin, end = ("{% generation %}", "{% endgeneration %}")
    twin = TONES.replace("[[", begin).replace("]]", end)
    bytes_.chat_template = twin if marked else TONES.replace("[[", "").replace("]]", "")
    given: list[Any] = [{"tone": "kindly "}, {"tone": None}, {}, None, {"documents": []}]
    chats = [chat(CHATS["one"])] * len(given)
    cells = [json.dumps(cell) if text and cell is not None else cell for cell in given]
    table = Table("t", {"messages": chats, "chat_template_kwargs": cells}, list(range(1, 6)), "row")
    data_format = recognize_format(table)
    assert data_format.variables == "chat_template_kwargs"
    assert not data_format.unused
    rows, _ = chat_rows(table, data_format, bytes_, 999)
    for row, messages, variables in zip(rows, chats, given, strict=True):
        known = {name: value for name, value in (variables or {}).items() if value is not None}
        expected = bytes_.apply_chat_template(
            messages, chat_template=twin, return_assistant_tokens_mask=True, return_dict=True, **known
        )
        assert row["input_ids"] == expected["input_ids"]
        pairs = zip(expected["input_ids"], expected["assistant_masks"], strict=True)
        # In a marked template the variable is part of the turn; in another one it may be part of any.
        if marked:
            assert row["labels"] == [token if mask else -100 for token, mask in pairs]
        assert bytes_.decode([t for t in row["labels"] if t != -100]).endswith("Hello!<|im_end|>")


def test_every_wrong_variable_is_listed(bytes_: Any) -> None:
    bytes_.chat_template = PLAIN["chatml"]
    cells = ["{", [1], {"tools": []}, {"add_generation_prompt": True}]
    rows = {"messages": [chat(CHATS["one"])] * 4, "chat_template_kwargs": cells}
    for wrong, faults in (
        (cells[:2], ["not valid JSON", "a list instead of an object"]),
        (cells[2:], ["tools", "add_gen"]),
    ):
        table = Table("t", {**rows, "messages": rows["messages"][:2], "chat_template_kwargs": wrong}, [1, 2], "row")
        with pytest.raises(DataError) as caught:
            chat_rows(table, recognize_format(table), bytes_, 999)
        assert len(caught.value.faults) == 2
        for fault in faults:
            assert fault in str(caught.value)
    table = Table("t", {**rows, "chat_template_kwargs": [{"tone": "a"}] * 4}, [1, 2, 3, 4], "row")
    for read in (lambda: read_prompts(table), lambda: read_answered(table, recognize_format(table), bytes_)):
        with pytest.raises(DataError, match=r"row 1.*chat_template_kwargs.*not supported here"):
            read()


@pytest.mark.parametrize("text", [True, False])
def test_the_variables_of_the_training_may_be_in_a_file_of_prompts(text: bool) -> None:
    """`generate` takes the training file, as `eval --generate` does: prompts are rendered with these variables."""
    given = [{"tone": "kind", "more": None}, {}]
    cells = [json.dumps(cell) for cell in given] if text else given
    columns = {"messages": [chat(CHATS["one"])] * 2, "chat_template_kwargs": cells, "tools": ["[]", None]}
    table = Table("t", columns, [1, 2], "row")
    assert len(read_prompts(table, trained=TrainedFormat("chat", "messages", variables={"tone": "kind"}))) == 2
    with pytest.raises(DataError, match="row 1: chat_template_kwargs other than those of the training"):
        read_prompts(table, trained=TrainedFormat("chat", "messages", variables={"tone": "cold"}))
