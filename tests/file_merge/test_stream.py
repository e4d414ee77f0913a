"""Merging file to file against the merge in memory, bit by bit, on the shapes and layouts that checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from file_merge.merges import (
    assert_merges_alike,
    assert_same_bits,
    layout,
    merged_in_memory,
    refused,
    save_adapter,
    save_base,
    tensors_of,
)
from helpers import drop_modules, randomize, run_command, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from safetensors.torch import load_file, save_file

from hf_lora import (
    BaseMismatchError,
    ConfigError,
    LoraConfig,
    LoraModel,
    MergeError,
    apply_lora,
    merge_files,
    merge_to_folder,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_keep_their_layout(tmp_path: Path, dtype: str) -> None:
    base = save_base(tiny_llama().to(getattr(torch, dtype)), tmp_path, "20KB")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", **patterns)
    out = assert_merges_alike(base, adapter, tmp_path)
    assert len(layout(base)) > 1
    assert layout(out) == layout(base)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    changed = {n for n, t in tensors_of(base).items() if not torch.equal(t, tensors_of(out)[n])}
    assert changed == {n for n in tensors_of(base) if "_proj" in n}


def test_transposed_layers(tmp_path: Path) -> None:
    base = save_base(tiny_gpt2(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj", "wpe"])
    assert_merges_alike(base, adapter, tmp_path)


@pytest.mark.parametrize(("tied", "untie"), [(True, False), (True, True), (False, False)])
def test_the_bias_that_a_head_shares(tmp_path: Path, tied: bool, untie: bool) -> None:
    """It has two names in memory and one in the files, unless an adapter of the decoder ends its tie."""
    base = save_base(tiny_bert(cls="BertForMaskedLM", tie_word_embeddings=tied), tmp_path)
    targets = ["query", "decoder"] if untie else ["query"]
    adapter = save_adapter(base, tmp_path, bias="all", target_modules=targets, modules_to_save=[])
    out = assert_merges_alike(base, adapter, tmp_path, untie=untie)
    name = "cls.predictions.decoder.bias"
    assert (name in tensors_of(out)) == (name in tensors_of(base) or untie)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_a_bias_that_is_trained_and_gets_an_update(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tiny_bert(cls="BertForMaskedLM").to(dtype), tmp_path)
    for bias in ("all", "lora_only"):
        adapter = save_adapter(base, tmp_path, name=bias, lora_bias=True, bias=bias, modules_to_save=[])
        merged = tensors_of(assert_merges_alike(base, adapter, tmp_path / bias))
        name = "bert.encoder.layer.0.attention.self.query"
        held = tensors_of(adapter)
        own, added = (held[f"base_model.model.{name}.{key}"] for key in ("base_layer.bias", "lora_B.bias"))
        assert torch.equal(merged[f"{name}.bias"], (own.double() + 2 * added.double()).to(dtype))  # alpha is 2 r


def test_a_head_with_other_labels_around_another_models_backbone(tmp_path: Path) -> None:
    base = save_base(tiny_bert(cls="BertForPreTraining"), tmp_path)
    from transformers import BertForSequenceClassification

    adapter = save_adapter(base, tmp_path, BertForSequenceClassification, task_type="SEQ_CLS", labels=5, bias="all")
    out = assert_merges_alike(base, adapter, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 5
    assert layout(out)["model.safetensors"][-2:] == ["classifier.weight", "classifier.bias"]


def test_the_backbone_alone_under_its_own_names(tmp_path: Path) -> None:
    """The files lack the prefix that the classifier's modules have; gamma and beta are older names."""
    from transformers import BertForSequenceClassification

    base = save_base(tiny_bert(cls="BertModel"), tmp_path)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors_of(base).items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(base, tmp_path, BertForSequenceClassification, task_type="SEQ_CLS", bias="all")
    whole = merged_in_memory(base, adapter, tmp_path)
    out = merge_files(base, adapter, tmp_path / "out")
    assert layout(out)["model.safetensors"][: len(old)] == layout(base)["model.safetensors"]
    again, report = BertForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_bits(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_refused_or_written_twice(tmp_path: Path, target: str) -> None:
    base = save_base(tiny_llama(tied=True), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", target_modules=["q_proj", target])
    with pytest.raises(MergeError, match="is tied to"):
        merge_files(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = assert_merges_alike(base, adapter, tmp_path, untie=True)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_embedding_that_is_kept_whole_ends_the_tie(tmp_path: Path) -> None:
    base = save_base(tiny_llama(tied=True), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    assert_merges_alike(base, adapter, tmp_path)


def grown(base: Path, folder: Path, *kept: str, rows: int = 5) -> Path:
    """An adapter trained after the vocabulary had grown by some rows."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + rows)
    apply_lora(
        model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=list(kept) or None)
    )
    randomize(model)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload()
    model.save_pretrained(folder / "memory")
    return folder / "adapter"


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_has_grown(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    base = save_base(tiny_llama(tied=tied), tmp_path, "20KB")
    out = merge_files(base, grown(base, tmp_path, "embed_tokens", "lm_head"), tmp_path / "out")
    assert_same_bits(tensors_of(out), tensors_of(tmp_path / "memory"))
    again, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["mismatched_keys"]
    assert again.config.vocab_size == len(again.lm_head.weight) == tiny_llama().config.vocab_size + 5
    assert again.config.tie_word_embeddings is False


def test_new_rows_that_are_in_no_file_are_not_made_up(tmp_path: Path) -> None:
    """Earlier versions wrote such files."""
    both = ("embed_tokens", "lm_head")
    for tied, kept, error, said in (
        (False, ("embed_tokens",), MergeError, "shape: lm_head.weight is"),
        (True, ("embed_tokens",), MergeError, "its own new rows are in no file"),
        (False, (), BaseMismatchError, "the new rows are in no file"),
    ):
        folder = tmp_path / f"{tied} {len(kept)}"
        base = save_base(tiny_llama(tied=tied), folder)
        adapter = drop_modules(grown(base, folder, *both), *(name for name in both if name not in kept))
        assert said in refused(error, base, adapter, folder / "out")


@pytest.mark.parametrize("rows", [60, 70])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_of_peft_with_another_vocabulary(tmp_path: Path, rows: int, tied: bool) -> None:
    """PEFT's files do not say how many rows the embedding had: the tensor does."""
    import peft
    from transformers import LlamaForCausalLM

    base = save_base(tiny_llama(tied=tied), tmp_path, "20KB")
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    out = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    memory = LoraModel.from_pretrained(tmp_path / "adapter", base_model=base, merge=True)
    memory.save_pretrained(tmp_path / "memory", max_shard_size="20KB")
    assert_same_bits(tensors_of(out), tensors_of(tmp_path / "memory"))
    again = LlamaForCausalLM.from_pretrained(out)
    assert again.config.vocab_size == rows
    with torch.no_grad():
        assert torch.allclose(again(token_ids() % 60).logits, theirs(token_ids() % 60).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("both", [False, True], ids=["one name", "both names"])
def test_a_trained_bias_that_has_two_names(tmp_path: Path, both: bool) -> None:
    from transformers import MPNetConfig, MPNetForMaskedLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = MPNetForMaskedLM(MPNetConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    base = save_base(model, tmp_path)
    file = base / "model.safetensors"
    held = load_file(file)
    names = {"lm_head.bias", "lm_head.decoder.bias"}
    if both:
        held |= {name: model.lm_head.bias.detach().clone() for name in names}
        save_file(held, file, metadata={"format": "pt"})
    assert len(names & held.keys()) == (2 if both else 1)
    adapter = save_adapter(base, tmp_path, bias="all")
    out = merge_files(base, adapter, tmp_path / "out")
    assert tensors_of(out).keys() == held.keys()
    memory = LoraModel.from_pretrained(adapter, base_model=base, merge=True)
    assert_same_bits(MPNetForMaskedLM.from_pretrained(out).state_dict(), memory.state_dict())


def test_tables_of_positions_that_no_file_holds(tmp_path: Path) -> None:
    """Marian computes them: they are in no file of the base and in none of the result."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    base = save_base(MarianMTModel(config), tmp_path)
    adapter = save_adapter(base, tmp_path)
    out = merge_files(base, adapter, tmp_path / "out")
    memory = LoraModel.from_pretrained(adapter, base_model=base, merge=True)
    found, report = MarianMTModel.from_pretrained(out, output_loading_info=True)
    assert_same_bits(found.state_dict(), memory.state_dict())
    assert not report["unexpected_keys"]


def test_a_tensor_of_the_base_that_holds_nan_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_base(model, tmp_path)
    adapter = save_adapter(base, tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    model.save_pretrained(base)
    message = refused(MergeError, base, adapter, tmp_path / "out", allow_other_base=True)
    assert "merge_files(" in message
    assert "model.layers.1.mlp.up_proj.weight: a merged value is not finite" in message
    assert not list((tmp_path / "out").glob("[!.]*"))


def save_mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return save_base(MixtralForCausalLM(config), folder, "40KB")


def test_a_router_that_is_kept_whole_and_experts_that_are(tmp_path: Path) -> None:
    base = save_mixtral(tmp_path)
    whole = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    adapter = save_adapter(base, tmp_path, name="router", modules_to_save=["gate"], **whole)
    out = assert_merges_alike(base, adapter, tmp_path)
    changed = {n for n, t in tensors_of(base).items() if not torch.equal(t, tensors_of(out)[n])}
    assert {n.split(".")[-2] for n in changed} == {"gate", "q_proj"}
    adapter = save_adapter(base, tmp_path, name="experts", modules_to_save=["experts"], **whole)
    said = refused(MergeError, base, adapter, tmp_path / "experts out")
    assert "model.layers.1.mlp.experts.down_proj: the checkpoint holds it as" in said


def test_experts_are_copied_and_their_attention_is_merged(tmp_path: Path) -> None:
    """Experts lie one by one on disk and stacked in memory; layers are called otherwise on disk."""
    base = save_mixtral(tmp_path)
    assert any("block_sparse_moe.experts.3.w1" in n for n in tensors_of(base))
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    out = assert_merges_alike(base, adapter, tmp_path)
    assert layout(out) == layout(base)


def test_one_tensor_on_disk_that_is_three_layers_in_memory(tmp_path: Path) -> None:
    from transformers import NomicBertConfig, NomicBertModel

    torch.manual_seed(0)
    config = NomicBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    base = save_base(NomicBertModel(config), tmp_path)
    fused = [n for n in tensors_of(base) if "Wqkv" in n]
    assert fused
    adapter = save_adapter(base, tmp_path, target_modules=["q_proj", "v_proj", "down_proj"])
    out = assert_merges_alike(base, adapter, tmp_path)
    before, after = tensors_of(base)[fused[0]], tensors_of(out)[fused[0]]
    rows = (before != after).any(1).view(3, -1).any(1)
    assert rows.tolist() == [True, False, True]


def test_files_that_peft_wrote(tmp_path: Path) -> None:
    import peft

    base = save_base(tiny_llama(), tmp_path)
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"],
        task_type="CAUSAL_LM", use_rslora=True,
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    out = assert_merges_alike(base, tmp_path / "adapter", tmp_path)
    theirs = model.merge_and_unload()(token_ids()).logits
    ours = AutoModelForCausalLM.from_pretrained(out)(token_ids()).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("held", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_another_dtype_is_rounded_to_once(tmp_path: Path, held: str, wanted: str) -> None:
    base = save_base(tiny_llama().to(getattr(torch, held)), tmp_path, "20KB")
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    whole = LoraModel.from_pretrained(adapter, base_model=str(base), dtype=torch.float32, merge=True)
    out = merge_files(base, adapter, tmp_path / "out", dtype=wanted)
    expected = {n: t.to(getattr(torch, wanted)) for n, t in whole.state_dict().items()}
    assert_same_bits(tensors_of(out), expected)
    assert layout(out) == layout(base)
    assert json.loads((out / "config.json").read_text())["dtype"] == wanted
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_the_adapters_tokenizer_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    for folder, files in (
        (base, ("tokenizer.json", "vocab.json", "tokenizer_config.json")),
        (adapter, ("tokenizer_config.json",)),
    ):
        for name in files:
            (folder / name).write_text(json.dumps({"of": folder.name}))
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    out = merge_files(base, adapter, tmp_path / "out")
    assert json.loads((out / "tokenizer_config.json").read_text())["of"] == "adapter"
    assert not {"tokenizer.json", "vocab.json", "pytorch_model.bin", "adapter_config.json"} & {
        p.name for p in out.iterdir()
    }


def test_a_layer_with_counters_that_is_kept_whole(tmp_path: Path) -> None:
    """A batch norm counts its batches in integers, which are written as they are."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=1
    )
    base = save_base(ResNetForImageClassification(config), tmp_path)
    model = ResNetForImageClassification.from_pretrained(base)
    kept = "resnet.embedder.embedder.normalization"
    apply_lora(model, LoraConfig(r=2, target_modules=["convolution"], modules_to_save=[kept]))
    randomize(model)
    model.train()(torch.randn(2, 1, 32, 32))
    model.save_pretrained(tmp_path / "adapter")
    out = merge_files(base, tmp_path / "adapter", tmp_path / "out")
    merged_in_memory(base, tmp_path / "adapter", tmp_path)
    assert_same_bits(tensors_of(out), tensors_of(tmp_path / "memory"))
    assert tensors_of(out)[f"{kept}.num_batches_tracked"] == 1


def test_one_function_merges_in_memory_or_file_to_file(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path, "20KB")
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    by_file = merge_to_folder(adapter, tmp_path / "out", in_memory=False, progress=False)  # the base that it names
    assert layout(by_file) == layout(base)
    in_memory = merge_to_folder(adapter, tmp_path / "memory", base_model=str(base))
    assert_same_bits(tensors_of(by_file), tensors_of(in_memory))
    with pytest.raises(ConfigError, match="device_map need in_memory=True"):
        merge_to_folder(adapter, tmp_path / "none", in_memory=False, device_map="cpu")
    with pytest.raises(ConfigError, match="must be a folder or a repository"):
        merge_to_folder(adapter, tmp_path / "none", in_memory=False, base_model=tiny_llama())
    with pytest.raises(ConfigError, match="'float32'"):
        merge_to_folder(adapter, tmp_path / "none", dtype="float23")


def test_the_command_takes_three_names(tmp_path: Path) -> None:
    base = save_base(tiny_llama(tied=True), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM", target_modules=["lm_head"])
    assert "is tied to" in run_command("merge", base, adapter, tmp_path / "out", code=2).stderr
    assert "Merged" in run_command("merge", base, adapter, tmp_path / "out", "--untie", "--quiet").output
    merged_in_memory(base, adapter, tmp_path, untie=True)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "memory"))
    assert "hf-lora merge BASE ADAPTER OUT" in run_command("merge", base, adapter, code=2).stderr
