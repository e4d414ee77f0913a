"""Which tokens of a chat are learned: those that the assistant generates, on every kind of template and tokenizer.

The references are transformers' own masks of a marked twin of each template, TRL's training templates, and counts by
hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATS, FORGETS, MARKED, NO_TOKENS, ONE_EXPRESSION, PLAIN, TWINS, byte_tokenizer, chat

from hf_lora.data.chat import chat_rows, label_chat, label_pair, label_text
from hf_lora.data.formats import recognize_format
from hf_lora.data.tables import Table
from hf_lora.errors import DataError
from hf_lora.versions import is_older


def reference(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens and labels by transformers' own mask of a marked template."""
    row = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    pairs = zip(row["input_ids"], row["assistant_masks"], strict=True)
    return row["input_ids"], [token if mask else -100 for token, mask in pairs]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("turns", CHATS.values(), ids=CHATS)
def test_labels_without_marks_are_those_of_the_marked_twin(
    bytes_: Any, name: str, turns: list[tuple[str, str]]
) -> None:
    expected = reference(bytes_, MARKED[name], chat(turns))
    for template in (PLAIN[name], MARKED[name]):
        bytes_.chat_template = template
        assert label_chat(bytes_, chat(turns)) == expected
    answers = sum(role == "assistant" for role, _ in turns)
    ends = {bytes_.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>")}
    assert sum(label in ends for label in expected[1]) == answers


@pytest.mark.parametrize("turns", CHATS.values(), ids=CHATS)
def test_a_template_of_one_expression_for_all_roles(bytes_: Any, turns: list[tuple[str, str]]) -> None:
    bytes_.chat_template = ONE_EXPRESSION
    assert label_chat(bytes_, chat(turns)) == reference(bytes_, MARKED["default"], chat(turns))


@pytest.mark.parametrize("family", ["cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "qwen2_5", "qwen3_vl"])
def test_labels_are_those_of_the_training_templates_of_trl(bytes_: Any, family: str) -> None:
    """But for white space that nobody generates, and what they learn at the end of a chat that is over."""
    from trl import chat_template_utils

    file = Path(chat_template_utils.__file__).parent / "chat_templates" / f"{family}.jinja"
    bytes_.chat_template = file.read_text(encoding="utf-8")
    training = chat_template_utils.get_training_chat_template(bytes_)
    assert training is not None
    blank = {t for t in range(len(bytes_)) if not bytes_.decode([t]).strip()}
    for name in ("one", "code"):
        ids, labels = label_chat(bytes_, chat(CHATS[name]))
        expected_ids, expected = reference(bytes_, training, chat(CHATS[name]))
        assert ids == expected_ids
        if family == "phi3" and name == "one":  # it learns the end of the chat behind the end of the turn
            assert expected[-1] == bytes_.eos_token_id
            expected[-1] = -100
        visible = [[-100 if label in blank else label for label in row] for row in (labels, expected)]
        assert visible[0] == visible[1]


@pytest.mark.parametrize("name", ["chatml", "turns"])
def test_offsets_without_white_space_give_the_same_labels(bytes_: Any, name: str) -> None:
    trimmed = byte_tokenizer(PLAIN[name], trim=True)
    bytes_.chat_template = PLAIN[name]
    for turns in CHATS.values():
        assert label_chat(trimmed, chat(turns)) == label_chat(bytes_, chat(turns))


def words(rstrip: bool = False) -> Any:
    """A tokenizer that drops all white space; its closing token may take what follows into its offsets."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>", "hi", "you", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(t, rstrip=rstrip, normalized=False) for t in vocabulary[1:4]])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<unk>")
    fast.chat_template = PLAIN["closed"].replace("{% else %}{{ '<|endoftext|>' }}", "")
    return fast


@pytest.mark.parametrize("rstrip", [False, True])
def test_tokenizers_that_drop_or_take_white_space(rstrip: bool) -> None:
    turns = [("user", "hi you"), ("assistant", "yes"), ("user", "you"), ("assistant", "no yes")]
    ids, labels = label_chat(words(rstrip), chat(turns))
    assert ids == [1, 4, 5, 3, 2, 6, 3, 1, 5, 3, 2, 7, 6, 3]
    assert labels == [-100] * 5 + [6, 3] + [-100] * 4 + [7, 6, 3]


def test_marks_that_end_in_dropped_white_space_mark_no_more_than_their_turns() -> None:
    """transformers' own mask went on to the end of the chat there, over what the user says, before 5.24."""
    tokenizer = words()
    tokenizer.chat_template = MARKED["closed"].replace("{% else %}{{ '<|endoftext|>' }}", "")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>' }}", "'<|end|>\n' }}")
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "you"), ("assistant", "no")]
    ids, labels = label_chat(tokenizer, chat(turns))
    assert ids == [1, 4, 3, 2, 6, 3, 1, 5, 3, 2, 7, 3]
    assert labels == [-100] * 4 + [6, 3] + [-100] * 4 + [7, 3]
    whole = [-100] * 4 + ids[4:]
    expected = whole if is_older("transformers", "5.24") else labels
    assert reference(tokenizer, tokenizer.chat_template, chat(turns)) == (ids, expected)


def test_a_tokenizer_without_offsets_is_given_the_pieces() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = NO_TOKENS
    _, labels = label_chat(tokenizer, chat([("user", "a"), ("assistant", "é"), ("user", "b"), ("assistant", "c d")]))
    spoken = [*"é".encode(), None, *b"c d", None]
    assert [label for label in labels if label != -100] == [1 if b is None else b + 3 for b in spoken]


def test_a_token_across_the_border_is_not_learned_and_is_told() -> None:
    tokenizer = byte_tokenizer(NO_TOKENS)
    messages = chat([("user", "a"), ("assistant", "hello to")])
    ids, labels = label_chat(tokenizer, messages)
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces[-5:] == [":", " hello", " to", "</s>", "\n"]  # the prompt ends with the space of " hello"
    assert labels == [-100] * (len(ids) - 3) + ids[-3:-1] + [-100]
    data = Table("a.jsonl", {"messages": [messages]}, [1], "line", {})
    with pytest.warns(UserWarning, match=r"in 1 of 1 rows the first token of an answer also holds"):
        chat_rows(data, recognize_format(data), tokenizer, 100)


def test_tool_calls_are_learned_and_tools_reach_the_template(bytes_: Any) -> None:
    bytes_.chat_template = (
        "{% if tools %}{{ '<|im_start|>system\n' + tools[0]['name'] + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ '<|START_RESPONSE|>' + c['name'] + '<|END_RESPONSE|>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    messages = [*chat([("user", "2+2?")]), call, *chat([("tool", "4"), ("assistant", "It is 4.")])]
    ids, labels = label_chat(bytes_, messages, [{"name": "add"}])
    assert bytes_.decode(ids).startswith("<|im_start|>system\nadd<|im_end|>")
    learned = bytes_.decode([label for label in labels if label != -100])
    assert learned == "<|START_RESPONSE|>add<|END_RESPONSE|><|im_end|>It is 4.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last(bytes_: Any) -> None:
    bytes_.chat_template = FORGETS
    thought = "<think>2 and 2</think>4"
    messages = chat([("user", "2+2?"), ("assistant", thought), ("user", "sure?"), ("assistant", thought)])
    with pytest.raises(DataError, match=r"message 2: the template rewrites earlier turns.*last_turn_only"):
        label_chat(bytes_, messages)
    ids, labels = label_chat(bytes_, messages, last_turn_only=True)
    assert bytes_.decode([label for label in labels if label != -100]) == thought + "<|im_end|>"
    assert bytes_.decode(ids).count("think") == 2
    # marks are believed: what the template leaves of the first turn is learned
    bytes_.chat_template = MARKED["chatml"].replace("m['content'] +", "m['content'].split('</think>')[-1] +", 1)
    _, labels = label_chat(bytes_, messages)
    learned = bytes_.decode([label for label in labels if label != -100])
    assert learned == "4<|im_end|>" * 2


def test_the_last_turn_alone_and_the_prompts_of_pairs(bytes_: Any) -> None:
    messages = chat(CHATS["code"])
    for template in (PLAIN["headers"], MARKED["headers"]):
        bytes_.chat_template = template
        ids, labels = label_chat(bytes_, messages, last_turn_only=True)
        whole, all_labels = label_chat(bytes_, messages)
        assert ids == whole[: len(ids)]  # the user's last words, which nobody answers, are left out
        last = max(t for t, label in enumerate(all_labels) if label != -100)
        assert [t for t, label in enumerate(labels) if label != -100] == [last - 1, last]
        _, later = label_chat(bytes_, messages, train_from=4)
        first = next(t for t, label in enumerate(later) if label != -100)
        assert later[first:] == all_labels[first:]
        assert bytes_.decode([label for label in later if label != -100]).startswith("assistant\nassistant<|eot_id|>")


def test_a_turn_has_its_own_marks_if_the_messages_before_it_cannot_be_rendered(bytes_: Any) -> None:
    """Few-shot examples, of which only the last answer is trained."""
    messages = chat([*CHATS["one"], ("user", "and?"), ("assistant", "4"), ("user", "left"), ("assistant", "right")])
    rejects = "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('no answer') }}{% endif %}"
    bytes_.chat_template = MARKED["chatml"]
    _, expected = label_chat(bytes_, messages, last_turn_only=True)
    bytes_.chat_template = rejects + MARKED["chatml"]
    _, labels = label_chat(bytes_, messages, last_turn_only=True)
    assert labels == expected
    assert bytes_.decode([label for label in labels if label != -100]) == "right<|im_end|>"
    # Two marks in each turn: which are the last turn's is unknown.
    twice = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    bytes_.chat_template = rejects + (
        "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}" + twice + " " + twice
        + "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    )  # fmt: skip
    with pytest.raises(DataError, match="unknown which marks belong to this turn"):
        label_chat(bytes_, messages, last_turn_only=True)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (PLAIN["chatml"], [("user", "a")], "there is no assistant message"),
        (PLAIN["chatml"], [("assistant", "a"), ("user", "b")], "message 1: the assistant message is the first"),
        (PLAIN["chatml"].replace("m['content'] + ", ""), CHATS["one"], "message 2: no token of the"),
        ("{{ raise_exception('no system') }}", CHATS["one"], "rejects the chat (TemplateError: no system)"),
        (
            PLAIN["chatml"][:-len("{% endif %}")] + "{{ '<think>' }}{% endif %}", CHATS["one"],
            "message 2: the template does not begin the turn with its generation prompt",
        ),
        (
            MARKED["chatml"].replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"),
            [*CHATS["one"], *CHATS["one"]], "message 2: the template marks nothing",
        ),
        (None, CHATS["one"], "the tokenizer has no chat template"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_labeled(
    bytes_: Any, template: str | None, turns: list[tuple[str, str]], message: str
) -> None:
    bytes_.chat_template = template
    with pytest.raises(DataError) as error:
        label_chat(bytes_, chat(turns))
    assert message in str(error.value)


def test_texts_and_pairs_end_with_the_end_token(bytes_: Any) -> None:
    from tokenizers import processors

    end = bytes_.eos_token_id
    ask, answer = (bytes_(t)["input_ids"] for t in ("2+2=", " 4"))
    assert label_pair(bytes_, "2+2=", " 4") == ([*ask, *answer, end], [-100] * len(ask) + [*answer, end])
    assert label_pair(bytes_, "2+2=", " 4</s>") == label_pair(bytes_, "2+2=", " 4")
    assert label_text(bytes_, "2+2=") == ([*ask, end], [*ask, end])
    both = byte_tokenizer()
    both.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[
        ("<s>", 1), ("</s>", end)
    ])  # fmt: skip
    assert label_pair(both, "2+2=", " 4") == ([1, *ask, *answer, end], [-100] * (len(ask) + 1) + [*answer, end])
    assert label_text(both, "2+2=") == ([1, *ask, end], [1, *ask, end])
    endless = byte_tokenizer(eos=None)
    for label in (lambda: label_pair(endless, "a", "b"), lambda: label_text(endless, "a")):
        with pytest.raises(DataError, match=r"no EOS token.*Set tokenizer.eos_token"):
            label()
