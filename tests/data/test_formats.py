"""The form of a file is told by its columns; every row that does not fit is named with its file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lora.data.formats import Example, describe, read_examples, recognize_format
from hf_lora.data.tables import Table, read_table
from hf_lora.errors import DataError

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = [ASK, ANSWER]


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table("rows.jsonl", columns, list(range(2, count + 2)), "line", {})


def read(data: Table, **named: str) -> list[Example]:
    return read_examples(data, recognize_format(data, **named))


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            {"messages": [CHAT, [*CHAT, ASK, ANSWER]], "id": [1, 2]},
            "messages: 2 chats from 'messages', 3.0 turns each; loss on the assistant's tokens; not used: 'id'",
        ),
        (
            {"messages": [CHAT], "text": ["a"], "tools": [None]},
            "messages: 1 chats from 'messages', 2.0 turns each with the tools in 'tools'; loss on the assistant's "
            "tokens; not used: 'text'",
        ),
        (
            {"conversations": [[{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]]},
            "conversations: 1 chats from 'conversations', 2.0 turns each; loss on the assistant's tokens",
        ),
        (
            {"prompt": ["2+2?"], "completion": ["4"]},
            "prompt+completion: 1 pairs from 'prompt' and 'completion', without a chat template; loss on 'completion'",
        ),
        (
            {"prompt": [[ASK]], "completion": [[ANSWER]]},
            "prompt+completion: 1 chats from 'prompt' and 'completion', 2.0 turns each; loss on the assistant's "
            "tokens in 'completion'",
        ),
        (
            {"instruction": ["Add."], "input": ["2+2"], "output": ["4"]},
            "instruction+output: 1 pairs from 'instruction' with 'input' and 'output', without a chat template; loss "
            "on 'output'",
        ),
        (
            {"instruction": ["Add."], "response": ["4"]},
            "instruction+response: 1 pairs from 'instruction' and 'response', without a chat template; loss on "
            "'response'",
        ),
        (
            {"text": ["a"], "question": ["2+2?"], "answer": ["4"]},
            "question+answer: 1 pairs from 'question' and 'answer', without a chat template; loss on 'answer'; not "
            "used: 'text'",
        ),
        (
            {"prompt": ["2+2?"], "response": ["4"], "answer": [""]},
            "prompt+response: 1 pairs from 'prompt' and 'response', without a chat template; loss on 'response'; not "
            "used: 'answer'",
        ),
        ({"text": ["a", "b"]}, "text: 2 texts from 'text'; loss on every token"),
        ({"messages": [None], "text": ["a"]}, "text: 1 texts from 'text'; loss on every token; not used: 'messages'"),
    ],
)
def test_formats_are_recognized_by_their_columns_and_printed(columns: dict[str, list[Any]], line: str) -> None:
    assert describe(recognize_format(table(**columns))) == line


def test_named_columns_win() -> None:
    data = table(messages=[CHAT], query=["2+2?"], reply=["4"], log=[CHAT], input=["a"])
    assert read(data, text="query", completion="reply") == [Example(prompt="2+2?", completion="4")]
    assert read(data, text="log") == [Example(messages=CHAT)]
    assert read(data, text="query") == [Example(text="2+2?")]
    assert read(data, completion="reply") == [Example(prompt="a", completion="4")]
    assert "through the chat template" in describe(recognize_format(data, "query", "reply"), templated=True)
    with pytest.raises(DataError, match=r"no column 'repl' \(did you mean 'reply'\?\)"):
        recognize_format(data, completion="repl")
    with pytest.raises(DataError, match=r"which column holds the prompts for 'reply'.*text_column"):
        recognize_format(table(query=["a"], reply=["b"]), completion="reply")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"a": ["x"], "b": ["y"]},
            "its columns 'a', 'b' match no known format. The formats are: 'messages'; 'convers",
        ),
        (
            {"instruction": ["a"], "output": ["b"], "response": ["c"]},
            "'instruction' and 'output'; or 'instruction'",
        ),
        ({"prompt": ["a"], "answer": ["b"], "response": ["c"]}, "text_column and completion_column"),
        (
            {"messages": [None, CHAT, None], "prompt": [None, None, "a"], "completion": [None, None, "b"]},
            "rows.jsonl mixes formats: line 3 fills 'messages', line 4 fills only 'prompt' and 'completion'",
        ),
        (
            {"prompt": ["a", None], "completion": ["b", None], "text": [None, "c"]},
            "mixes formats: line 2 fills 'prompt' and 'completion', line 3 fills only 'text'",
        ),
        (
            {"question": ["a", None], "answer": ["b", None], "prompt": [None, "a"], "completion": [None, "b"]},
            "mixes formats: line 3 fills 'prompt' and 'completion', line 2 fills only 'question' and 'answer'",
        ),
    ],
)
def test_columns_that_fit_no_form_or_several(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError) as error:
        recognize_format(table(**columns))
    assert message in str(error.value)


def test_every_form_is_read_into_messages_or_texts() -> None:
    system = {"from": "system", "value": ""}
    spoken = [{"from": who, "value": "x"} for who in ("human", "gpt", "user", "chatgpt", "bot", "assistant")]
    roles = [m["role"] for m in read(table(conversations=[[system, *spoken]]))[0].messages or []]
    assert roles == ["system", "user", "assistant", "user", "assistant", "assistant", "assistant"]
    assert read(table(conversations=[[{"from": "human", "value": "2+2?"}, ANSWER]])) == [Example(messages=CHAT)]
    assert read(table(prompt=[[ASK]], completion=[[ANSWER]])) == [Example(messages=CHAT, train_from=1)]
    pair = table(instruction=["Add.", "Wait."], input=["2+2", ""], output=["4", "ok"])
    assert [e.prompt for e in read(pair)] == ["Add.\n\n2+2", "Wait."]
    assert read(table(prompt=[""], completion=["b"])) == [Example(prompt="", completion="b")]
    # a column of structures, as parquet has it, fills what a message lacks with nulls
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "name": None}
    chat = [{**ASK, "tool_calls": None}, call, {"role": "tool", "content": ""}, ANSWER]
    (example,) = read(table(messages=[chat], tools=['[{"name": "add"}]']))
    assert example.messages is not None
    assert example.messages[0] == ASK
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert example.tools == [{"name": "add"}]


def test_lists_of_messages_may_be_json_text_in_their_cells(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    cell = json.dumps(CHAT).replace('"', '""')
    file.write_text(f'messages,id\n"{cell}",1\n', encoding="utf-8")
    assert read(read_table(file)) == [Example(messages=CHAT)]
    file.write_text('messages\n"[{]"\n"[{""role"": ""user""}]"\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        read(read_table(file))
    assert f"{file}, line 2, column 'messages': not valid JSON (Expecting property name" in str(error.value)
    assert "at character 3)" in str(error.value)
    assert f"{file}, line 3, column 'messages', message 1: no content" in str(error.value)


def test_all_faults_of_chats_are_listed_with_their_places() -> None:
    bad: list[Any] = [
        [ASK, {"role": "asistant", "content": "4"}],
        [ASK],
        [{"role": "user"}, {"role": "user", "content": 3}, {"role": "user", "content": " "}, ANSWER],
        [],
        None,
        {"role": "user"},
        [ASK, "4"],
        [{"content": "a"}, ANSWER],
    ]
    with pytest.raises(DataError) as error:
        read(table(messages=[CHAT, *bad], tools=[None, *["{"] * 2, *[None] * 6]))
    for part in (
        "line 3, column 'messages', message 2: the role 'asistant' is unknown (did you mean 'assistant'?)",
        "line 4, column 'messages': there is no assistant message",
        "line 5, column 'messages', message 1: no content",
        "line 5, column 'messages', message 2: the content is a int, not text",
        "line 5, column 'messages', message 3: the content is empty",
        "line 6, column 'messages': the cell is empty",
        "line 7, column 'messages': the cell is empty",
        "line 8, column 'messages': a dict instead of a list",
        "line 9, column 'messages', message 2: a str instead of an object",
        "line 10, column 'messages', message 1: no role",
        "line 3, column 'tools': not valid JSON",
        "the roles are system, developer, user, assistant, tool",
    ):
        assert part in str(error.value)
    assert "line 2" not in str(error.value)
    with pytest.raises(DataError, match=r"line 2, column 'completion': there is no assistant message"):
        read(table(prompt=[[*CHAT, ASK]], completion=[[ASK]]))


def test_faults_of_texts_are_listed_with_their_places() -> None:
    pair = table(instruction=["a", "", "c", "d"], input=[None, "", 3, ""], output=["x", "y", "z", None])
    with pytest.raises(DataError) as error:
        read(pair)
    for part in ("line 3, column 'instruction': the text is empty", "line 4, column 'input': 3 is not text",
                 "line 5, column 'output': None is not text"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"line 3, column 'text': the text is empty"):
        read(table(text=["a", " "]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": [}\n', "line 1, column 15: Expecting value"),
        (b"", "has no rows"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not valid UTF-8"),
    ],
)
def test_broken_files_are_refused_before_their_form_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(read_table(file))
    assert f"{file}" in str(error.value)
    assert message in str(error.value)
