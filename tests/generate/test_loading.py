"""What is loaded for answers: adapters, merged ones and full models, with the tokenizer of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generate.tiny_chat import PROMPTS, TEMPLATE, tiny_tokenizer
from helpers import tiny_llama

import hf_lora
from hf_lora import AdapterFileError, ConfigError, LoraModel, StateError, generate_texts, load_for_generation


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
