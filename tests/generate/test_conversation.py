"""A conversation against the prompts that it should make."""

from __future__ import annotations

from typing import Any

import pytest
from generate.tiny_chat import own_answer, tiny_tokenizer
from helpers import tiny_bert, tiny_llama

from hf_lora import ConfigError, Conversation, DataError, StateError
from hf_lora.data.trained import TrainedFormat


def test_a_conversation_with_a_merged_model_is_told_what_its_adapter_recorded(tokenizer: Any) -> None:
    trained = TrainedFormat("chat", "messages", system="w10", variables={"x": 1})
    chat = Conversation(tiny_llama(), tokenizer, trained=trained)
    assert (chat.system, chat._variables) == ("w10", {"x": 1})


def test_a_conversation_keeps_what_was_said_and_streams(adapted: Any, tokenizer: Any) -> None:
    chat = Conversation(adapted, tokenizer, system="w10", max_new_tokens=5)
    pieces: list[str] = []
    first = chat.say("w9 w8", pieces.append)
    assert "".join(pieces) == first
    assert len(pieces) > 1
    prompt = "<system> w10 </s> <user> w9 w8 </s> <assistant>"
    assert first == own_answer(adapted, tokenizer, tokenizer(prompt)["input_ids"], 5)
    second = chat.say("w7")
    prompt += f" {first} </s> <user> w7 </s> <assistant>"
    assert second == own_answer(adapted, tokenizer, tokenizer(prompt)["input_ids"], 5)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.messages == []
    assert chat.say("w9 w8") == first


def test_the_base_answers_while_the_adapter_is_off(adapted: Any, tokenizer: Any) -> None:
    base = tiny_llama().double()
    chat, plain = Conversation(adapted, tokenizer, max_new_tokens=6), Conversation(base, tokenizer, max_new_tokens=6)
    chat.use_adapter(False)
    assert not chat.adapter_in_use
    answer = chat.say("w9")
    assert answer == plain.say("w9")
    other = Conversation(adapted, tokenizer, max_new_tokens=6)  # shares the model, which was not left disabled
    with_adapter = other.say("w9")
    assert with_adapter != answer
    chat.use_adapter(True)
    chat.reset()
    assert chat.say("w9") == with_adapter
    with pytest.raises(StateError, match="plain or merged"):
        plain.use_adapter(True)


def test_the_oldest_exchanges_are_left_out_when_the_window_is_full(adapted: Any, tokenizer: Any) -> None:
    """64 tokens; each exchange has at most 3 + 10 + 2 + 8, and an answer may want 8."""
    chat = Conversation(adapted, tokenizer, max_new_tokens=8)
    for turn in range(4):
        last = chat.say(" ".join(f"w{10 * turn + i + 6}" for i in range(10)))
    assert chat.forgotten == 8 - len(chat.messages) > 0
    assert chat.messages[0]["role"] == "user"
    prompt = tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
    assert last == own_answer(adapted, tokenizer, tokenizer(prompt)["input_ids"])
    before = list(chat.messages)
    with pytest.raises(DataError, match=r"has 73 tokens.*window has 64"):
        chat.say(" ".join(["w9"] * 70))
    assert chat.messages == before
    assert chat.say(" ".join(["w9"] * 57))  # alone, with four tokens for the answer
    assert len(chat.messages) == 2


def test_an_interrupted_answer_is_kept_as_far_as_it_came(adapted: Any, tokenizer: Any) -> None:
    whole = Conversation(adapted, tokenizer, max_new_tokens=8).say("w9")
    chat = Conversation(adapted, tokenizer, max_new_tokens=8)
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("w9", stop)
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert whole.startswith("".join(pieces))
    chat.reset()
    with pytest.raises(ZeroDivisionError):
        chat.say("w9", lambda _: [1 / 0])
    assert chat.messages == []


def test_what_no_conversation_can_be_had_with(adapted: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)top_p=2.*no chat template"):
        Conversation(adapted, tiny_tokenizer(None), top_p=2)
    with pytest.raises(StateError, match="does not generate text"):
        Conversation(tiny_bert(), tokenizer)
    with pytest.raises(DataError, match="empty"):
        Conversation(adapted, tokenizer).say("  ")


def test_a_seed_makes_a_drawn_conversation_repeatable(adapted: Any, tokenizer: Any) -> None:
    def talk(seed: int) -> list[str]:
        chat = Conversation(adapted, tokenizer, max_new_tokens=6, temperature=3.0, seed=seed)
        return [chat.say("w9"), chat.say("w9")]

    assert talk(1) == talk(1) != talk(2)
