"""Files that went through other hands: rows of tied weights, heads that are missing, folders that PEFT wrote into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import assert_near, batch_for, randomize, tiny_bert, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lora import (
    AdapterFileError,
    BaseMismatchError,
    LoraConfig,
    LoraModel,
    MergeError,
    StateError,
    TargetError,
    apply_lora,
    merge_files,
)
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.format import WEIGHTS_NAME


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch_for(model, labels=False)).logits


def tied_llama() -> Any:
    return tiny_llama(tied=True)


ROWS: dict[str, tuple[Any, Any]] = {
    "by the embedding": (tied_llama, [3, 7]),
    "by the head": (tied_llama, {"lm_head": [3, 7]}),
    "another model": (tiny_gpt2, [3, 7]),
}


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_tied_weights_are_merged_from_file_to_file_as_in_memory(
    case: str, untie: bool, tmp_path: Path
) -> None:
    make, rows = ROWS[case]
    base = make()
    base.save_pretrained(tmp_path / "base")
    targets = ["c_attn"] if case == "another model" else ["q_proj"]
    model = randomize(apply_lora(base, LoraConfig(r=4, target_modules=targets, trainable_token_indices=rows)))
    model.save_pretrained(tmp_path / "adapter")
    y = logits(model)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=untie)
    merged = type(make()).from_pretrained(tmp_path / "merged")
    model.merge_and_unload(untie=untie)
    assert_near(logits(merged), y, torch.float32, 64)
    assert torch.equal(logits(merged), logits(model))


def test_rows_beside_an_adapter_of_the_tied_module_are_refused() -> None:
    """PEFT adds B A to the rows, and without it the rows replace the product; a merge could hold neither."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 7])
    with pytest.raises(TargetError, match="shares its weight with a module whose tensors are trained"):
        apply_lora(tied_llama(), config)


def test_rows_and_an_adapter_of_the_tied_module_cannot_be_merged_together() -> None:
    model = apply_lora(tied_llama(), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3]), "rows")
    model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"]))
    model.set_adapter(["rows", "head"])
    randomize(model)
    with pytest.raises(MergeError, match="another update applies to all of them"):
        model.merge_adapter(untie=True)


@pytest.mark.parametrize("wrote", ["ours", "peft"])
def test_a_head_that_the_file_names_and_lacks_is_missing(wrote: str, tmp_path: Path) -> None:
    if wrote == "ours":
        config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
        randomize(apply_lora(tiny_bert(), config)).save_pretrained(tmp_path)
    else:
        theirs = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
        peft.get_peft_model(tiny_bert(), theirs).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    kept = {key: tensor for key, tensor in tensors.items() if "classifier" not in key}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"missing[\s\S]*classifier"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_bert())


def test_new_rows_of_a_tied_head_must_be_in_the_file(tmp_path: Path) -> None:
    """The copy of the embedding is its own: the head keeps the base's weight, whose new rows would be random."""
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(BaseMismatchError, match="no file contains the new rows"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")


def test_a_folder_of_ours_that_peft_wrote_into_is_pefts(tmp_path: Path) -> None:
    randomize(apply_lora(tiny_bert(labels=3), LoraConfig(r=4, target_modules=["query"]))).save_pretrained(tmp_path)
    theirs = peft.get_peft_model(
        tiny_bert(labels=5),
        peft.LoraConfig(
            r=2, target_modules=["value"], modules_to_save=["classifier"], use_dora=True, task_type="SEQ_CLS"
        ),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(tmp_path, base_model=tiny_bert(labels=5))
    assert_near(logits(loaded), logits(theirs), torch.float32, 64)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", True])
def test_peft_reads_a_trained_bias_whatever_the_initialization(init: str | bool, tmp_path: Path) -> None:
    model = apply_lora(
        tiny_bert(),
        LoraConfig(r=4, target_modules=["query"], lora_bias=True, init_lora_weights=init, modules_to_save=[]),
    )
    randomize(model).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert_near(logits(theirs), logits(model), torch.float32, 64)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_pefts_copy_of_a_head_whose_initialization_reduced_it_is_not_compared(init: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=init)
    theirs = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "adapter" / WEIGHTS_NAME))
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")
    assert_near(logits(loaded), logits(theirs), torch.float32, 256)


def test_adapters_that_take_turns_on_one_base_in_memory(tmp_path: Path) -> None:
    """Each computes what it does on a base of its own, and what one leaves behind does not reach the next."""
    kinds: dict[str, dict[str, Any]] = {
        "factors": {"target_modules": ["q_proj"]},
        "a head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        "an embedding": {"target_modules": ["embed_tokens"], "r": 2},
    }
    for name, config in kinds.items():
        randomize(apply_lora(tiny_llama(), LoraConfig(**config))).save_pretrained(tmp_path / name)
    alone = {name: logits(LoraModel.from_pretrained(tmp_path / name, base_model=tiny_llama())) for name in kinds}
    base = tiny_llama()
    plain = logits(base)
    for name in (*kinds, *reversed(kinds)):
        model = LoraModel.from_pretrained(tmp_path / name, base_model=base)
        assert torch.equal(logits(model), alone[name])
        with pytest.raises(StateError, match=r"unload\(\) first"):
            LoraModel.from_pretrained(tmp_path / name, base_model=base)
        base = model.unload()
        assert torch.equal(logits(base), plain)


def test_a_target_whose_factors_the_file_lacks(tmp_path: Path) -> None:
    """Some tools name the output layer in the configuration and write full names with a rank for each."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens", "lm_head"]
    ranks = dict(zip(names, (2, 3, 4, 5), strict=True))
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(
            r=8, target_modules=names, rank_pattern=ranks, alpha_pattern=dict(ranks), init_lora_weights=False
        ),
    )
    theirs.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert_near(logits(loaded), logits(theirs), torch.float32, 64)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    kept = {key: tensor for key, tensor in tensors.items() if "lm_head.lora_B" not in key}
    save_file(kept, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"missing: \S*lm_head\.lora_B"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())


def test_a_model_of_two_kinds_of_attention(tmp_path: Path) -> None:
    """Linear and full attention by turns, with twelve names of layers, loaded and merged in both ways."""
    kind = transformers.Qwen3_5ForCausalLM
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    kind(config).save_pretrained(tmp_path / "base")
    names = (
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj"
    )
    settings = peft.LoraConfig(r=4, target_modules=names.split(), init_lora_weights=False)
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), settings)
    theirs.save_pretrained(tmp_path / "adapter")
    y = logits(theirs)
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")
    assert {layer.rpartition(".")[2] for layer in adapter_layers(loaded)} == {*names.split()}
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert_near(logits(loaded), y, torch.float32, 64)
    assert_near(logits(loaded.merge_and_unload()), y, torch.float32, 512)
    assert_near(logits(kind.from_pretrained(tmp_path / "merged")), y, torch.float32, 512)
