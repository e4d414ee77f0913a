"""`hf-lora chat` and `generate` against `generate_texts` and `Conversation`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import run_command as run
from helpers import write_lines
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_lora import Conversation, DataError, generate_texts, load_for_generation
from hf_lora.cli.main import app
from hf_lora.data.prompts import read_prompts
from hf_lora.data.tables import read_table
from hf_lora.testing import LocalHub


@pytest.fixture(scope="module")
def loaded(chat_adapter: str) -> tuple[Any, Any]:
    return load_for_generation(chat_adapter)


def chat(adapter: str, *lines: str, options: tuple[str, ...] = ()) -> list[str]:
    """The lines that a chat prints for these lines of a pipe, then its errors."""
    words = ["chat", adapter, "--max-new-tokens", "6", *options]
    result = CliRunner().invoke(app, words, input="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.output
    return [*result.stdout.splitlines(), *(line for line in result.stderr.splitlines() if line.startswith("Error: "))]


def test_models_on_the_hub_and_adapters_in_folders(
    chat_adapter: str, llama_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--prompt", "open the door", "--max-new-tokens", "4")
    shutil.copytree(chat_adapter, tmp_path / "two" / "inner")
    expected = run("generate", chat_adapter, *words).stdout
    assert run("generate", tmp_path / "two", "--subfolder", "inner", *words).stdout == expected
    run("merge", chat_adapter, "--out", tmp_path / "merged")
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        hub.add_repo("user/merged", tmp_path / "merged")
        assert run("generate", "user/merged", *words).stdout == expected
        with monkeypatch.context() as patch:  # undone before the Hub is, which restores the value from before
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert run("generate", "user/merged", *words).stdout == expected


# chat ----------------------------------------------------------------------------------------------------------------


def test_a_chat_through_a_pipe(chat_adapter: str, llama_folder: str, loaded: tuple[Any, Any]) -> None:
    lines = chat(chat_adapter, "open the door", "/base", "close it", "/adapter", "/reset", "open the door")
    reference = Conversation(*loaded, max_new_tokens=6)
    first = reference.say("open the door")
    reference.use_adapter(False)
    second = reference.say("close it")
    assert first != second
    assert lines[0].startswith(f"adapter {chat_adapter} on {llama_folder}, not merged (float32, cpu). /help lists")
    assert first
    assert second
    assert lines[1:] == [
        "> open the door", first,
        "> /base", "Using the base model.",
        "> close it", second,
        "> /adapter", "Using the adapter.",
        "> /reset", "The conversation is cleared.",
        "> open the door", first, "",
    ]  # fmt: skip


def test_the_commands_of_a_chat(chat_adapter: str, loaded: tuple[Any, Any]) -> None:
    lines = chat(chat_adapter, "/system please", "the door", "", "/hlep", "/help", "/quit", "never read")
    assert lines[1:3] == ["> /system please", "The system message is: please"]
    assert lines[4] == Conversation(*loaded, system="please", max_new_tokens=6).say("the door")
    assert lines[7] == "Unknown command /hlep (did you mean '/help'?). /help lists the commands."
    assert [line.split()[0] for line in lines[9:15]] == ["/base", "/adapter", "/reset", "/system", "/help", "/quit"]
    assert lines[-1] == "> /quit"


def test_a_merged_adapter_says_so_and_cannot_be_switched(chat_adapter: str) -> None:
    lines = chat(chat_adapter, "/base", "door", options=("--merge",))
    assert f"adapter {chat_adapter}, merged" in lines[0]
    assert "plain or merged model" in " ".join(lines)
    assert "> door" in lines, "the conversation went on"


def test_a_full_window_and_a_message_that_is_too_long_are_said(chat_adapter: str) -> None:
    lines = chat(chat_adapter, *["door " * 20] * 3, "door " * 70, "door")
    assert any("the oldest 2 messages were left out" in line for line in lines)
    assert any("Shorten it" in line for line in lines)
    assert "> door" in lines, "the conversation went on"


def test_ctrl_c_stops_the_answer_alone(chat_adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say = Conversation.say

    def interrupted(self: Any, text: str, stream: Any = None) -> str:
        if text == "stop":
            stream("half")
            raise KeyboardInterrupt
        return say(self, text, stream)

    monkeypatch.setattr(Conversation, "say", interrupted)
    lines = chat(chat_adapter, "stop", "door")
    assert lines[2] == "half … (stopped)"
    assert lines[3] == "> door"


def test_ctrl_c_at_the_prompt_leaves(chat_adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    def pressed(prompt: str) -> str:
        assert prompt == "> "
        raise KeyboardInterrupt

    from hf_lora.cli import generate

    monkeypatch.setattr(generate.sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", pressed)
    assert generate._read_line() is None


@pytest.mark.parametrize("command", ["chat", "generate", "eval"])
def test_each_command_has_help(command: str) -> None:
    assert "SOURCE" in run(command, "--help").stdout
    assert command in run("--help").stdout


# generate ------------------------------------------------------------------------------------------------------------


def test_prompts_on_the_command_line(chat_adapter: str, loaded: tuple[Any, Any]) -> None:
    prompts = ["open the door", "close it"]
    words = ["--max-new-tokens", "5", "--prompt", prompts[0], "--prompt", prompts[1]]
    assert (
        run("generate", chat_adapter, *words).stdout
        == "\n\n".join(generate_texts(*loaded, prompts, max_new_tokens=5)) + "\n"
    )
    raw = generate_texts(*loaded, prompts, max_new_tokens=5, use_chat_template=False)
    assert run("generate", chat_adapter, *words, "--raw").stdout == "\n\n".join(raw) + "\n"


def test_a_file_in_and_a_file_out(chat_adapter: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"open the {word}"} for i, word in enumerate(["door", "window", "light now please"])]
    write_lines(tmp_path / "in.jsonl", rows)
    result = run(
        "generate", chat_adapter, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl",
        "--max-new-tokens", 5, "--batch-size", 2, "--system", "please",
    )  # fmt: skip
    assert result.stdout == f"3 answers: {tmp_path / 'out.jsonl'}\n"
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = generate_texts(*loaded, [r["prompt"] for r in rows], max_new_tokens=5, system="please")
    assert found == [row | {"generated": answer} for row, answer in zip(rows, answers, strict=True)]
    assert {f.name for f in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_output_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", [{"prompt": "door", "generated": "x"}])
    before = file.read_bytes()
    message = run("generate", "nowhere", "--file", file, "--out", file, code=2).stderr
    assert "this is the input itself" in message
    assert "a column 'generated'" in message
    assert file.read_bytes() == before
    message = run("generate", "nowhere", "--file", file, "--out", tmp_path / "none" / "out.jsonl", code=2).stderr
    assert "does not exist" in message
    assert "this is a folder" in run("generate", "nowhere", "--file", file, "--out", tmp_path, code=2).stderr


@pytest.mark.parametrize("words", [[], ["--prompt", "a", "--file", "f.txt"], ["--prompt", "a", "--out", "o.jsonl"]])
def test_words_that_do_not_go_together(words: list[str]) -> None:
    assert "Error: hf-lora generate: " in run("generate", "nowhere", *words, code=2).stderr


USER, ASSISTANT = {"role": "user", "content": "door"}, {"role": "assistant", "content": "now"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "prompt": "no"}, [USER]),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [USER, ASSISTANT, USER]),
        ({"messages": json.dumps([USER])}, [USER]),
        ({"conversations": [{"from": "human", "value": "door"}, {"from": "gpt", "value": "now"}]}, [USER]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER]),
        ({"answer": "x", "question": "door?"}, "door?"),
        ({"instruction": "open", "input": "door", "output": "x"}, "open\n\ndoor"),
        ({"instruction": "open", "input": "", "output": "x"}, "open"),
        ({"text": "door"}, "door"),
        ({"text": "door", "input": "no"}, "door"),
        ({"input": "door", "output": "x"}, "door"),
    ],
)
def test_the_prompts_of_each_form(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    table = read_table(write_lines(tmp_path / "rows.jsonl", [row] * 2))
    assert read_prompts(table) == [expected] * 2


def test_prompts_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffopen\n\n the door\n", encoding="utf-8")
    assert read_prompts(read_table(tmp_path / "a.txt", prompts=True)) == ["open", " the door"]
    (tmp_path / "a.csv").write_text("mine,text\nopen,no\n", encoding="utf-8")
    assert read_prompts(read_table(tmp_path / "a.csv", prompts=True), "mine") == ["open"]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[USER, ASSISTANT]]}), tmp_path / "a.parquet")
    assert read_prompts(read_table(tmp_path / "a.parquet", prompts=True)) == [[USER]]


def test_rows_without_a_prompt_are_all_named(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": " "}, {"prompt": 3}])
    with pytest.raises(DataError, match=r"(?s)line 2, column 'prompt': the text is empty.*line 3.*not text"):
        read_prompts(read_table(file, prompts=True))
    file = write_lines(tmp_path / "b.jsonl", [{"messages": [ASSISTANT]}, {"messages": "[{"}, {"messages": [USER]}])
    with pytest.raises(DataError, match=r"(?s)line 1.*no user message.*line 2.*not valid JSON") as error:
        read_prompts(read_table(file, prompts=True))
    assert str(error.value).count("  - ") == 2
    file = write_lines(tmp_path / "g.jsonl", [{"messages": [USER], "tools": [{"name": "x"}]}])
    with pytest.raises(DataError, match="line 1, column 'tools'"):
        read_prompts(read_table(file, prompts=True))
    file = write_lines(tmp_path / "c.jsonl", [{"a": "b"}])
    with pytest.raises(DataError, match=r"It has 'a'; known names are messages.*--column"):
        read_prompts(read_table(file, prompts=True))
    for name, content, fault in (("d.txt", b"\n \n", "no rows"), ("e.txt", b"\xff\xfe\xfa", "UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=fault):
            read_table(tmp_path / name, prompts=True)
    with pytest.raises(DataError, match="does not exist"):
        read_table(tmp_path / "f.txt", prompts=True)
