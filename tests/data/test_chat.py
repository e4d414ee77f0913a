"""Which tokens of a chat are learned: those that the assistant generates, on every kind of template and tokenizer.

The references are transformers' own masks of a marked twin of each template, TRL's training templates, and counts by
hand.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lora.data.chat import chat_rows, is_templated, label_chat, label_pair, label_text, show_batch
from hf_lora.data.formats import recognize_format
from hf_lora.data.prompts import read_answered, read_prompts
from hf_lora.data.tables import Table, read_table
from hf_lora.data.trained import TrainedFormat
from hf_lora.errors import ConfigError, DataError
from hf_lora.versions import is_older

SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>",
    "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip

# [[ and ]] stand where the marked twin has its marks and the template itself has nothing.
LOOP = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
TWINS = {
    "chatml": LOOP + "{{ '<|im_start|>assistant\n' }}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "headers": "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "[[{{ m['content'] | trim + '<|eot_id|>' }}]]{% else %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "bars": LOOP + "{{ '<|assistant|>' }}[[{{ '\n' + m['content'] + eos_token }}]]{{ '\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "turns": "{{ bos_token }}" + LOOP + "{{ '<start_of_turn>model\n' }}[[{{ m['content'] | trim + '<end_of_turn>' }}"
    "]]{{ '\n' }}{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # closes the whole chat with one token more, behind white space
    "closed": LOOP + "{{ '<|assistant|>\n' }}[[{{ m['content'] + '<|end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    # a template that begins with a default system message
    "default": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}  # fmt: skip
PLAIN = {name: text.replace("[[", "").replace("]]", "") for name, text in TWINS.items()}
MARKED = {
    name: text.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}") for name, text in TWINS.items()
}
# The same chats by one expression for all roles, as it stands in the tokenizers of small models.
ONE_EXPRESSION = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Takes the reasoning out of every turn but the last.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NO_TOKENS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

CHATS: dict[str, list[tuple[str, str]]] = {
    "one": [("user", "Hello, world."), ("assistant", "Hello!")],
    "spaces": [("user", " a "), ("assistant", " b \n\n"), ("user", "\nc"), ("assistant", "\n d")],
    "system": [("system", "Be kind."), ("user", "Καλημέρα"), ("assistant", "日本語 é 👍")],
    "empty system": [("system", ""), ("user", "a"), ("assistant", "the end<|")],
    "code": [
        ("user", "def f(x):"), ("assistant", "```py\n    return x\n```"), ("user", "and?"), ("assistant", "4"),
        ("user", "user"), ("assistant", "assistant\nassistant"), ("user", "a"), ("assistant", "a"), ("user", "left"),
    ],
}  # fmt: skip


def chat(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def byte_tokenizer(template: str | None = None, trim: bool = False, corpus: str = "", eos: str | None = "</s>") -> Any:
    """A byte-level tokenizer with some merges; `trim` takes white space out of its offsets, as older ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([corpus or "Hello, world. The assistant said hello to the user."] * 9, trainer)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def bytes_() -> Any:
    return byte_tokenizer()


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
