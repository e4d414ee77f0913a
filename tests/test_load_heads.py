"""Heads, labels and vocabularies come back with an adapter, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch_of, llama_adapter, logits, tiny_vit
from helpers import assert_near, assert_same_tensors, drop_modules, randomize, snapshot, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file

from hf_lora import AdapterFileError, BaseMismatchError, LoraConfig, LoraModel, apply_lora
from hf_lora.files.format import WEIGHTS_NAME


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return llama_adapter(tmp_path)


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False], ids=["our file", "PEFT's file"])
def test_a_head_with_more_labels_than_the_base(ours: bool, tmp_path: Path) -> None:
    """The base's config says 2 labels; the adapter was trained with 5."""
    backbone = tiny_bert(cls="BertModel", labels=2)
    backbone.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    if ours:
        model = randomize(apply_lora(base))
    else:
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(base, config)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded).__name__ == "BertForSequenceClassification"
    ids = batch_of(tiny_bert())["input_ids"]
    with torch.no_grad():
        found, expected = loaded(ids).logits, model(ids).logits
    assert found.shape[-1] == 5
    assert_near(found, expected, torch.float32, factor=16)
    assert loaded.num_labels == loaded.config.num_labels == len(loaded.config.id2label) == 5
    assert torch.isfinite(loaded(ids, labels=torch.tensor([4, 0])).loss)


@pytest.mark.parametrize(
    ("family", "task", "cls"),
    [
        ("llama", "SEQ_CLS", "SequenceClassification"),
        ("bert", "TOKEN_CLS", "TokenClassification"),
        ("bert", "QUESTION_ANS", "QuestionAnswering"),
    ],
)
def test_the_class_and_head_of_a_foreign_file(family: str, task: str, cls: str, tmp_path: Path) -> None:
    """From PEFT's task type, and the outputs of a head with or without a bias."""
    import transformers

    backbone = tiny_llama().model if family == "llama" else tiny_bert(cls="BertModel", labels=2)
    backbone.save_pretrained(tmp_path / "base")
    labels = {} if task == "QUESTION_ANS" else {"num_labels": 5}
    base = getattr(transformers, f"AutoModelFor{cls}").from_pretrained(tmp_path / "base", **labels)
    targets = ["q_proj"] if family == "llama" else ["query"]
    config = peft.LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", pad_token_id=0)
    assert type(loaded).__name__ == type(base).__name__
    ids = batch_of(tiny_bert())["input_ids"]
    model.config.pad_token_id = 0
    with torch.no_grad():
        found, expected = loaded(ids), model(ids)
    assert_near(found[0], expected[0], torch.float32, factor=32)
    assert len(loaded.config.id2label) == labels.get("num_labels", 2)


def test_label_names_and_problem_type_come_back(tmp_path: Path) -> None:
    base = tiny_bert(labels=3)
    base.save_pretrained(tmp_path / "base")
    names = {0: "good", 1: "bad"}
    model = apply_lora(tiny_bert(labels=3), adapter_name="first")
    model.add_adapter("mood", LoraConfig(r=2), id2label=names)
    model.config.problem_type = None
    model.save_pretrained(tmp_path / "mood", adapter_name="mood")
    loaded = LoraModel.from_pretrained(tmp_path / "mood", base_model=tmp_path / "base")
    assert loaded.config.id2label == names
    assert loaded.config.label2id == {"good": 0, "bad": 1}
    assert loaded.unload().config.num_labels == 3


def test_adapters_of_two_tasks_swap_on_one_base(tmp_path: Path) -> None:
    outputs = {}
    for name, labels in (("two", 2), ("five", 5)):
        model = randomize(apply_lora(tiny_bert(), LoraConfig(r=2), num_labels=labels), seed=labels).eval()
        ids = batch_of(tiny_bert())["input_ids"]
        with torch.no_grad():
            outputs[name] = model(ids).logits
        model.save_pretrained(tmp_path / name)
    loaded = LoraModel.from_pretrained(tmp_path / "two", base_model=tiny_bert(), adapter_name="two")
    loaded.load_adapter(tmp_path / "five", "five")
    assert loaded.active_adapters() == ["five"]
    for name in ("two", "five", "two"):
        loaded.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, outputs[name])
        assert loaded.num_labels == outputs[name].shape[-1]


def test_an_image_model_of_a_foreign_file_without_a_task(tmp_path: Path) -> None:
    """PEFT has no task type for images and names the class in auto_mapping."""
    tiny_vit().save_pretrained(tmp_path / "base")
    base = type(tiny_vit()).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        target_modules=r".*\.(q_proj|query)", modules_to_save=["classifier"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded).__name__ == "ViTForImageClassification"
    assert_near(logits(loaded), logits(model.base_model.model), torch.float32, factor=16)


# Vocabulary ----------------------------------------------------------------------------------------------------------


def added_tokens(base: Any, saved: list[str] | None) -> Any:
    base.resize_token_embeddings(70, mean_resizing=False)
    return randomize(apply_lora(base, LoraConfig(target_modules=["q_proj"], modules_to_save=saved)))


@pytest.mark.parametrize("given", [False, True], ids=["base found", "base given"])
def test_a_resized_vocabulary_in_modules_to_save(adapter: Path, given: bool, tmp_path: Path) -> None:
    base = type(tiny_llama()).from_pretrained(adapter.parent / "base")
    model = added_tokens(base, ["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "grown")
    loaded = LoraModel.from_pretrained(tmp_path / "grown", base_model=tiny_llama() if given else None)
    ids = torch.tensor([[1, 66, 69, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.config.vocab_size == 70


def test_a_resized_vocabulary_that_is_in_no_file(adapter: Path, tmp_path: Path) -> None:
    model = added_tokens(type(tiny_llama()).from_pretrained(adapter.parent / "base"), ["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "grown")
    drop_modules(tmp_path / "grown", "embed_tokens", "lm_head")
    with pytest.raises(BaseMismatchError, match=r"70 rows.*the base has 64"):
        LoraModel.from_pretrained(tmp_path / "grown")
    assert LoraModel.from_pretrained(tmp_path / "grown", allow_other_base=True).config.vocab_size == 64


def test_an_output_embedding_that_the_checkpoint_lacks_is_trained_and_comes_back(tmp_path: Path) -> None:
    """A language model on the checkpoint of a backbone: the head is new, unlike one that was resized."""
    tiny_llama().model.save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = randomize(apply_lora(base, LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.lm_head.weight" in model.get_adapter_state_dict()
    assert torch.equal(logits(LoraModel.from_pretrained(tmp_path / "adapter")), logits(model))


def test_an_older_file_without_the_new_rows_of_the_output_embedding(adapter: Path, tmp_path: Path) -> None:
    model = added_tokens(type(tiny_llama()).from_pretrained(adapter.parent / "base"), ["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    LoraModel.from_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="no file contains the new rows"):
        LoraModel.from_pretrained(drop_modules(tmp_path, "lm_head"))
    LoraModel.from_pretrained(tmp_path, allow_other_base=True)


@pytest.mark.parametrize("tied", [False, True])
def test_pefts_file_of_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    """PEFT writes the embeddings whole and names them nowhere."""
    tiny_llama(tied=tied).save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 66, 69, 5]])
    with torch.no_grad():
        assert_near(loaded(ids).logits, model(ids).logits, torch.float32, factor=16)
        merged = loaded.merge_and_unload()
        assert_near(merged(ids).logits, model(ids).logits, torch.float32, factor=64)


def test_a_given_base_is_not_left_resized_by_a_load_that_fails(adapter: Path, tmp_path: Path) -> None:
    model = added_tokens(type(tiny_llama()).from_pretrained(adapter.parent / "base"), ["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "grown")
    tensors = load_file(tmp_path / "grown" / WEIGHTS_NAME)
    tensors["base_model.model.more"] = torch.ones(1)
    save_file(tensors, tmp_path / "grown" / WEIGHTS_NAME)
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match="more"):
        LoraModel.from_pretrained(tmp_path / "grown", base_model=base)
    assert_same_tensors(snapshot(base), before)
    assert base.config.vocab_size == 64
