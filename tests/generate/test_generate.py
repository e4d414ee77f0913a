"""Answers against transformers' own `generate`, and the prompts that they are to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.tiny_chat import PROMPTS, own_answer, tiny_tokenizer
from helpers import VOCABULARY, randomize, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tokenizers import processors

import hf_lora
from hf_lora import (
    AdapterFileError,
    ConfigError,
    DataError,
    LoraConfig,
    StateError,
    apply_lora,
    generate_answers,
    generate_texts,
)
from hf_lora.data.encode import encode_prompts
from hf_lora.data.prompts import AnswerFile
from hf_lora.data.tables import read_table

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
