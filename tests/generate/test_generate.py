"""Answers against transformers' own `generate`, and a conversation against the prompts that it should make."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, randomize, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import hf_lora
from hf_lora import (
    AdapterFileError,
    ConfigError,
    Conversation,
    DataError,
    LoraConfig,
    LoraModel,
    StateError,
    apply_lora,
    generate_answers,
    generate_texts,
    load_for_generation,
)
from hf_lora.data.encode import encode_prompts
from hf_lora.data.prompts import AnswerFile
from hf_lora.data.tables import read_table
from hf_lora.data.trained import TrainedFormat

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('who?') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
PROMPTS = ["w9", "w20 w21 w22 w23 w24 w25 w26", "w30 w31", "w11 w12 w13 w14", "w40 w41 w42"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A float64 model with a random adapter."""
    return randomize(apply_lora(tiny_llama().double(), LoraConfig(r=4))).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with its tokenizer, `adapter` on it, `merged`, and a classifier's adapter `three`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = randomize(apply_lora(type(tiny_llama()).from_pretrained(folder / "base"), LoraConfig(r=4)))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    tiny_bert().save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    bert = type(tiny_bert()).from_pretrained(folder / "bert")
    apply_lora(bert, LoraConfig(r=2)).save_pretrained(folder / "three")
    return folder


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def own_answer(model: Any, tokenizer: Any, ids: list[int], new: int = 8) -> str:
    """transformers' greedy answer to one prompt."""
    tokens = torch.tensor([ids])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_give_the_answers_of_transformers_one_by_one(
    adapted: Any, tokenizer: Any, batch_size: int, raw: bool
) -> None:
    if raw:
        encoded = [tokenizer(p)["input_ids"] for p in PROMPTS]
    else:
        encoded = [tokenizer(f"<user> {p} </s> <assistant>")["input_ids"] for p in PROMPTS]
    expected = [own_answer(adapted, tokenizer, ids) for ids in encoded]
    assert len(set(expected)) == len(PROMPTS)
    use = False if raw else None
    options: Any = {"max_new_tokens": 8, "batch_size": batch_size, "use_chat_template": use}
    assert generate_texts(adapted, tokenizer, PROMPTS, **options) == expected
    assert tokenizer.padding_side == "right"


def test_the_adapter_answers_and_disabled_the_base_does(adapted: Any, tokenizer: Any) -> None:
    base = tiny_llama().double()
    theirs = generate_texts(base, tokenizer, PROMPTS, max_new_tokens=8)
    with adapted.disable_adapter():
        assert generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=8) == theirs
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(ids, max_new_tokens=8), base.generate(ids, max_new_tokens=8))
    assert not torch.equal(adapted.generate(ids, max_new_tokens=8), base.generate(ids, max_new_tokens=8))


def test_gpt2_at_the_end_of_its_window(tokenizer: Any) -> None:
    """Its positions are a table: one more would be an IndexError. A neighbour in the batch is not cut short."""
    model = tiny_gpt2().double()
    model.generation_config.eos_token_id = None
    plain = tiny_tokenizer(None)
    plain.eos_token = None
    long, short = " ".join(f"w{i + 10}" for i in range(30)), "w9 w10"
    answers = generate_texts(model, plain, [short, long], max_new_tokens=8)
    assert [len(a.split()) for a in answers] == [8, 2]
    assert answers == [generate_texts(model, plain, [p], max_new_tokens=8)[0] for p in (short, long)]
    with pytest.raises(
        DataError, match=r"(?s)prompt 1 has 32 tokens; the model's context window has 32.*prompt 2 is empty"
    ):
        generate_texts(model, plain, [short, long + " w6 w7", ""], max_new_tokens=8)


def tiny_bart() -> Any:
    """An encoder-decoder with a table of positions, which start at the first token of a row."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.5,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("ends", [False, True])
def test_an_encoder_decoder(make: Any, batch_size: int, ends: bool) -> None:
    """As transformers answers one prompt; the encoder reads the EOS that the tokenizer adds."""
    model, tokenizer = make().double().eval(), tiny_tokenizer(None)
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert (ids[0, -1] == 2) == ends
        found = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[2, 1])
        expected.append(tokenizer.decode(found[0, 1:], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected


def test_an_answer_ends_at_the_tokenizers_end_and_at_a_stop(tokenizer: Any, adapted: Any) -> None:
    [whole] = generate_texts(adapted, tokenizer, PROMPTS[:1], max_new_tokens=12)
    words = whole.split()
    stop = next(word for word in words[3:] if words.index(word) >= 3)
    expected = whole[: whole.index(stop)]
    assert expected
    for stops in (stop, [stop, "never"]):
        assert generate_texts(adapted, tokenizer, PROMPTS[:1], max_new_tokens=12, stop=stops) == [expected]
    marked = tiny_tokenizer()
    marked.add_special_tokens({"additional_special_tokens": [stop]})  # decoding skips it
    assert generate_texts(adapted, marked, PROMPTS[:1], max_new_tokens=12, stop=stop)[0].split() == expected.split()
    other = tiny_tokenizer()
    other.eos_token = stop  # the one of the training need not be the model's
    assert generate_texts(adapted, other, PROMPTS[:1], max_new_tokens=12)[0].split() == expected.split()


def test_drawing_with_a_seed(adapted: Any, tokenizer: Any) -> None:
    before = torch.random.get_rng_state()
    drawn = [
        generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=8)
    assert generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-9) == greedy


def test_the_models_own_settings_neither_matter_nor_are_warned_of(
    tokenizer: Any, transformers_log: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama().double()
    expected = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6)
    own: dict[str, Any] = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 10, "num_beams": 2,
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "bad_words_ids": [[7]],
        "sequence_bias": [[[8], 50.0]], "forced_eos_token_id": None,
    }  # fmt: skip
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    transformers_log.clear()
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=2, temperature=0.5, seed=0)
    assert not [r for r in transformers_log.records if r.levelno >= logging.WARNING]


def test_training_mode_comes_back_and_dropout_is_off_meanwhile(tokenizer: Any) -> None:
    model = randomize(apply_lora(tiny_llama(attention_dropout=0.9), LoraConfig(r=4, lora_dropout=0.9))).train()
    first, second = (generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6) for _ in range(2))
    assert first == second
    assert model.training


def test_progress_and_no_prompts(adapted: Any, tokenizer: Any) -> None:
    seen: list[int] = []
    generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]
    assert generate_texts(adapted, tokenizer, []) == []


# Prompts -------------------------------------------------------------------------------------------------------------


def test_a_system_message_goes_before_chats_without_one(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "w9"},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w7"},
    ]
    own = [{"role": "system", "content": "w6"}, *chat]
    found = [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, ["w9", chat, own], "w10")]
    rest = "<user> w9 </s> <assistant> w8 </s> <user> w7 </s> <assistant>"
    assert found == [
        "<system> w10 </s> <user> w9 </s> <assistant>",
        f"<system> w10 </s> {rest}",
        f"<system> w6 </s> {rest}",
    ]
    assert len(chat) == 3


def test_prompts_that_cannot_be_used_are_all_named(adapted: Any, tokenizer: Any) -> None:
    wrong: list[Any] = [
        "w9",
        " ",
        [],
        [{"content": "w9"}],
        [{"role": "assistant", "content": "w9"}],
        [{"role": "pirate", "content": "w9"}],
        " ".join(["w9"] * 70),
    ]
    with pytest.raises(DataError) as error:
        generate_texts(adapted, tokenizer, wrong)
    faults = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [f.split()[2] for f in faults] == ["1", "2", "3", "4", "5", "6"]
    for part in (
        "is empty",
        "no messages",
        "'role' and 'content'",
        "ends with an assistant message",
        "who?",
        "73 tokens",
    ):
        assert part in str(error.value)


def test_settings_that_cannot_be_used_are_all_named(adapted: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as error:
        generate_texts(
            adapted, tokenizer, "w9", max_new_tokens=0, batch_size=0, temperature=-1.0, top_p=0.0, stop=["w9", ""]
        )
    for part in ("prompts", "max_new_tokens=0", "batch_size=0", "temperature=-1.0", "top_p=0.0", "stop"):
        assert part in str(error.value)
    chat = [[{"role": "user", "content": "w9"}]]
    for options in ({"system": "w8"}, {"use_chat_template": True}):
        with pytest.raises(ConfigError, match="no chat template"):
            generate_texts(adapted, tiny_tokenizer(None), ["w9"], **options)
    with pytest.raises(ConfigError, match="no chat template"):
        generate_texts(adapted, tiny_tokenizer(None), chat)
    with pytest.raises(ConfigError, match="plain texts"):
        generate_texts(adapted, tokenizer, chat, use_chat_template=False)
    with pytest.raises(StateError, match="does not generate text"):
        generate_texts(tiny_bert(), tokenizer, ["w9"])


def test_a_file_is_answered_by_a_model_in_memory(adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    seen: list[tuple[int, int]] = []
    options: Any = {"tokenizer": tokenizer, "max_new_tokens": 4}
    expected = generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=4)
    found = generate_answers(adapted, file=file, out=out, progress=lambda *n: seen.append(n), **options)
    assert found == expected == generate_answers(adapted, PROMPTS, **options)
    assert seen == [(5, 5)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": prompt, "generated": answer} for prompt, answer in zip(PROMPTS, expected, strict=True)
    ]
    before = out.read_bytes()
    file.write_text("w9 " * 70)
    with pytest.raises(DataError, match="prompt 0 has"):
        generate_answers(adapted, file=file, out=out, **options)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]
    with pytest.raises(ConfigError, match="tokenizer= is missing"):
        generate_answers(adapted, PROMPTS)


def test_answers_are_kept_when_a_run_is_cut_off(
    adapted: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    out.write_text("before")
    expected = generate_texts(adapted, tokenizer, PROMPTS, max_new_tokens=4)
    options: Any = {"tokenizer": tokenizer, "max_new_tokens": 4, "batch_size": 2, "file": file, "out": out}

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(logging.getLogger("hf_lora"), "propagate", True)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(adapted, progress=interrupt, **options)
    partial = tmp_path / "out.jsonl.partial"
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["generated"] == expected[PROMPTS.index(row["prompt"])] for row in rows)
    assert out.read_text() == "before"
    assert f"{partial} holds the 4 rows that were answered" in caplog.text

    assert generate_answers(adapted, **options) == expected
    assert not partial.exists()
    assert [json.loads(line)["generated"] for line in out.read_text().splitlines()] == expected


def test_the_answers_of_an_earlier_run_are_kept(adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A later run renames them with its first answer, and leaves them as they are if it fails before."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "w9", "completion": "w10"}\n')
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("earlier")
    for call in (
        lambda: generate_answers("no-such-model", file=file, out=out),
        lambda: hf_lora.evaluate("no-such-model", file, generate=True, predictions=out),
    ):
        with pytest.raises(AdapterFileError):
            call()
        assert partial.read_text() == "earlier"
    options: Any = {"file": file, "out": out, "tokenizer": tokenizer, "max_new_tokens": 2}
    generate_answers(adapted, **options)
    assert (tmp_path / "out.jsonl.partial.1").read_text() == "earlier"
    partial.write_text("second")
    generate_answers(adapted, **options)
    assert [file.read_text() for file in sorted(tmp_path.glob("*.partial*"))] == ["earlier", "second"]


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("w9\n")
    (tmp_path / "closed.jsonl.partial").mkdir()
    with pytest.raises(ConfigError, match=r"closed.jsonl.partial cannot be written"):
        generate_answers("no-such-model", file=file, out=tmp_path / "closed.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_at_the_first_answer(adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("w9\nw10\n")
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"out.jsonl.partial: No space left on device. It holds 0 of 2 rows"):
        generate_answers(adapted, file=file, out=tmp_path / "out.jsonl", tokenizer=tokenizer, max_new_tokens=2)


def test_a_lone_surrogate_in_a_row_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "w9", "id": "\\ud800"}\n{"prompt": "w10", "id": "\u00e9"}\n', encoding="utf-8")
    with AnswerFile(read_table(file), tmp_path / "out.jsonl") as answers:
        answers.add(1, "second")
        answers.add(0, "first \udc00")
        answers.finish()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"prompt": "w9", "id": "\ud800", "generated": "first \udc00"},
        {"prompt": "w10", "id": "\u00e9", "generated": "second"},
    ]


# Loading -------------------------------------------------------------------------------------------------------------


def test_adapter_merged_adapter_and_merged_model_answer_alike(folders: Path) -> None:
    answers = []
    for source, merge in (("adapter", False), ("adapter", True), ("merged", False)):
        if source == "merged":
            tiny_tokenizer().save_pretrained(folders / "merged")
        model, tokenizer = load_for_generation(folders / source, merge=merge, device="cpu")
        assert isinstance(model, LoraModel) is (source == "adapter" and not merge)
        assert not model.training
        answers.append(generate_texts(model.double(), tokenizer, PROMPTS, max_new_tokens=6))
    assert answers[0] == answers[1] == answers[2]
    base, tokenizer = load_for_generation(folders / "base", dtype="bfloat16")
    assert base.dtype == torch.bfloat16
    assert generate_texts(base.double(), tokenizer, PROMPTS, max_new_tokens=6) != answers[0]


def test_the_tokenizer_of_the_training_comes_first(folders: Path, tmp_path: Path) -> None:
    LoraModel.from_pretrained(folders / "adapter").save_pretrained(tmp_path)
    assert load_for_generation(tmp_path)[1].chat_template == TEMPLATE
    tiny_tokenizer("{{ 'mine' }}").save_pretrained(tmp_path)
    assert load_for_generation(tmp_path)[1].chat_template == "{{ 'mine' }}"


def test_what_cannot_be_loaded_is_said(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="not a local folder"):
        load_for_generation("nobody/no-such-model")
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        load_for_generation(tmp_path)
    with pytest.raises(StateError, match=r'adapter of a text-classification model.*pipeline\("text-classification"'):
        load_for_generation(folders / "three")
    with pytest.raises(StateError, match="BertForSequenceClassification, which does not generate text"):
        load_for_generation(folders / "bert")
    with pytest.raises(ConfigError, match=r"(?s)dtype='bf16'.*bfloat16.*device='gpu9'"):
        load_for_generation(folders / "adapter", dtype="bf16", device="gpu9")
    with pytest.raises(ConfigError, match="no adapter"):
        load_for_generation(folders / "base", merge=True)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"no tokenizer.*tokenizer\.save_pretrained"):
        load_for_generation(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="no language model could be loaded"):
        load_for_generation(tmp_path)


def test_the_pipeline_of_an_adapter_answers_as_generate_texts_does(folders: Path) -> None:
    asked: Any = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    pipe = hf_lora.pipeline("text-generation", folders / "adapter")
    model, tokenizer = load_for_generation(folders / "adapter")
    [expected] = generate_texts(model, tokenizer, PROMPTS[1:2], max_new_tokens=6, use_chat_template=False)
    assert pipe(PROMPTS[1], **asked)[0]["generated_text"].split() == expected.split()
    with pipe.model.disable_adapter():
        off = pipe(PROMPTS[1], **asked)[0]["generated_text"]
    [base] = generate_texts(tiny_llama(), tokenizer, PROMPTS[1:2], max_new_tokens=6, use_chat_template=False)
    assert off.split() == base.split() != expected.split()


# Conversations -------------------------------------------------------------------------------------------------------


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
