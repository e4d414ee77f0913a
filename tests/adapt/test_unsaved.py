"""What is trained with random weights that no file would have is refused, and the error names what to train whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, batch_for, randomize, tiny_bert, tiny_llama, tiny_t5

from hf_lora import AdapterFileError, LoraConfig, LoraModel, TargetError, apply_lora, explain_targets

MORE = VOCABULARY + 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        tiny_llama(tied=tied).save_pretrained(folder / f"llama-{tied}")
    tiny_t5().save_pretrained(folder / "t5")
    BertModel(tiny_bert().config, add_pooling_layer=False).save_pretrained(folder / "bert")
    return folder


def grown(model: Any) -> Any:
    model.resize_token_embeddings(MORE, mean_resizing=False)
    return model


def load(folder: Path, cls: str) -> Any:
    import transformers

    return getattr(transformers, cls).from_pretrained(folder).eval()


CASES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "head": (lambda b: load(b / "bert", "BertForSequenceClassification"), ["query"], ["bert.pooler", "classifier"]),
    "head of a decoder": (lambda b: load(b / "llama-False", "LlamaForSequenceClassification"), ["q_proj"], ["score"]),
    "pooler": (lambda b: load(b / "bert", "BertModel"), ["query"], ["pooler"]),
    "rows": (
        lambda b: grown(load(b / "llama-False", "LlamaForCausalLM")), ["q_proj"], ["model.embed_tokens", "lm_head"],
    ),
    "tied rows": (
        lambda b: grown(load(b / "llama-True", "LlamaForCausalLM")), ["q_proj"], ["model.embed_tokens", "lm_head"],
    ),
    "rows of an encoder-decoder": (
        lambda b: grown(load(b / "t5", "T5ForConditionalGeneration")), ["q"],
        ["shared", "lm_head"],
    ),
}  # fmt: skip


def advised(error: Exception) -> list[str]:
    found = re.search(r"modules_to_save=(\[.*?\])", str(error))
    assert found is not None, str(error)
    names: list[str] = eval(found[1])
    return names


@pytest.mark.parametrize("case", CASES)
def test_random_weights_in_no_file_are_refused_and_what_is_advised_comes_back(
    case: str, bases: Path, tmp_path: Path
) -> None:
    make, targets, random = CASES[case]
    model = make(bases)
    before = dict(model.named_parameters())
    for given in [[], random[:1]][: len(random)]:
        config = LoraConfig(target_modules=targets, modules_to_save=given)
        with pytest.raises(TargetError, match="random, and would be in no file") as raised:
            apply_lora(model, config)
        assert dict(model.named_parameters()).keys() == before.keys()
        assert set(random) == set(advised(raised.value))
        assert "would be in no file" in str(explain_targets(model, config))
    apply_lora(model, LoraConfig(target_modules=targets, modules_to_save=advised(raised.value)))
    batch = batch_for(model) if "rows" not in case else {"input_ids": torch.tensor([[1, 5, MORE - 1, MORE - 3]])}
    if "encoder" in case:
        batch["decoder_input_ids"] = torch.tensor([[0, MORE - 2]])
    batch = {name: each[:1] for name, each in batch.items() if name != "labels"}
    randomize(model)
    model.save_pretrained(tmp_path)
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = LoraModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_a_new_head_is_found_or_named_and_never_adapted(bases: Path) -> None:
    model = load(bases / "llama-False", "LlamaForSequenceClassification")
    with pytest.raises(TargetError, match="the base checkpoint lacks, which are trained whole; leave it out"):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "score"]))
    with pytest.raises(TargetError, match=r"score \(not in the base checkpoint\)"):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "score"], modules_to_save=[]))
    apply_lora(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="score"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"], modules_to_save=[]))


def test_what_is_resized_after_apply_is_refused_when_it_is_saved(bases: Path, tmp_path: Path) -> None:
    model = apply_lora(load(bases / "llama-True", "LlamaForCausalLM"), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "before")
    model.resize_token_embeddings(VOCABULARY - 4)  # no new rows
    model.save_pretrained(tmp_path / "smaller")
    grown(model)
    with pytest.raises(AdapterFileError, match=r"model.embed_tokens \(70 rows, 64 in the base checkpoint\)"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    ids = torch.tensor([[1, 66, 69, 5]])
    y = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")  # as the error advises
    assert torch.allclose(load(tmp_path / "merged", "LlamaForCausalLM")(ids).logits, y, atol=1e-4)


def test_what_was_loaded_may_be_saved_again(bases: Path, tmp_path: Path) -> None:
    """An adapter of a language model on the same model with a new head: nothing was trained with that head."""
    first = apply_lora(load(bases / "llama-False", "LlamaForCausalLM"), LoraConfig(target_modules=["q_proj"]))
    first.save_pretrained(tmp_path / "first")
    base = load(bases / "llama-False", "LlamaForSequenceClassification")
    model = LoraModel.from_pretrained(tmp_path / "first", base_model=base)
    model.save_pretrained(tmp_path / "again")
    trained = LoraModel.from_pretrained(
        tmp_path / "first", base_model=load(bases / "llama-False", "LlamaForSequenceClassification"), is_trainable=True
    )
    with pytest.raises(AdapterFileError, match="score"):
        trained.save_pretrained(tmp_path / "trained")


def test_the_parts_of_a_merged_model_are_not_new(bases: Path, tmp_path: Path) -> None:
    model = load(bases / "llama-True", "LlamaForCausalLM")
    randomize(apply_lora(model, LoraConfig(target_modules=["lm_head", "q_proj"])))
    model.merge_and_unload(untie=True)
    apply_lora(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[]))
    model.save_pretrained(tmp_path)
