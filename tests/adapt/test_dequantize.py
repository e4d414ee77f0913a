"""Merging a quantized base: a dense model comes out, computes the same, and nothing tells that it was quantized."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, folded, randomize, relative_error, tiny_gpt2, token_ids
from quantized_bases import QUANTIZED, bits, load, method, save_base
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import validate_quantization_for_training

from hf_lora import (
    BaseMismatchError,
    ConfigError,
    LoraConfig,
    LoraModel,
    LoraTrainer,
    LoraTrainingArguments,
    MergeError,
    StateError,
    apply_lora,
)
from hf_lora.adapt.check import check_adapter
from hf_lora.adapt.dequantize import dense_dtype, dequantize, is_quantized
from hf_lora.export import merge_to_folder
from hf_lora.layers.storages import QuantizedStorage

NOTES_OF_LOADING = {"_is_hf_initialized", "_hf_quantized_needs_local_tp"}
"""What transformers leaves on a layer that it loaded, and nobody reads again."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def adapted(base: Path, kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return randomize(apply_lora(load(base, kind, dtype), LoraConfig(**dict(r=4) | config)), scale=0.05)


@torch.no_grad()
def logits(model: Any, training: bool = False) -> Tensor:
    """LLM.int8 rounds activations outside training: compared in training, it is the weights alone that count."""
    found: Tensor = model.train(training)(input_ids=token_ids()).logits
    return found


def assert_dense(model: Any, dtype: torch.dtype) -> None:
    assert not is_quantized(model)
    for name, module in model.named_modules():
        if name.endswith("proj") or name == "lm_head":
            assert type(module) is nn.Linear, name
            assert set(vars(module)) - set(vars(nn.Linear(1, 1))) <= NOTES_OF_LOADING
            assert not module._load_state_dict_pre_hooks
        for parameter in module._parameters.values():
            assert parameter is None or (type(parameter) is nn.Parameter and parameter.dtype == dtype), name
    for name in ("quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        assert not getattr(model, name, None), name
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" not in model.config.to_dict()


@pytest.fixture(scope="module")
def reloaded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind merged, saved and loaded again by one fresh process: kind -> (logits before, merged, what it saw)."""
    folder, found = tmp_path_factory.mktemp("merged"), {}
    for kind in QUANTIZED:
        model = adapted(base, kind, torch.bfloat16)
        before = logits(model, training=True)
        dense = model.merge_and_unload()
        dense.save_pretrained(folder / kind)
        found[kind] = [before, logits(dense)]
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *QUANTIZED], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = torch.load(folder / "seen.pt")
    return {kind: [*values, seen[kind]] for kind, values in found.items()}


def in_a_fresh_process(folder: Path, kinds: list[str]) -> None:
    seen = {}
    for kind in kinds:
        model = LlamaForCausalLM.from_pretrained(folder / kind)
        linears = [m for n, m in model.named_modules() if n.endswith("proj")]
        seen[kind] = {
            "plain": [(type(m), type(m.weight)) for m in linears] == 14 * [(nn.Linear, nn.Parameter)],
            "dtype": str(model.dtype),
            "config": json.loads((folder / kind / "config.json").read_text()),
            "logits": logits(model),
        }
    assert not {"bitsandbytes", "torchao"} & {name for name in sys.modules if "." not in name} - IMPORTED
    torch.save(seen, folder / "seen.pt")


IMPORTED = set(sys.modules)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_saved_model_is_dense_and_equal_in_a_fresh_process(reloaded: dict[str, Any], kind: str) -> None:
    _, merged, seen = reloaded[kind]
    assert seen["plain"]
    assert seen["dtype"] == "torch.bfloat16"
    assert "quantization_config" not in seen["config"]
    assert seen["config"]["dtype"] == "bfloat16"
    assert torch.equal(seen["logits"], merged)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_merged_logits_are_the_unmerged_ones_within_bfloat16(base: Path, reloaded: dict[str, Any], kind: str) -> None:
    """The exact result is that of float32 weights; both bfloat16 models are as near to it as bfloat16 allows."""
    before, merged, _ = reloaded[kind]
    source = adapted(base, kind, torch.bfloat16)
    dense = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in source.named_modules():
        if hasattr(layer, "_lora"):
            weight = torch.cat([block for _, block in folded(layer, ("default",))])
            dense.get_submodule(name).weight.data = weight.float()
    for name, parameter in source.named_parameters():
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight")):
            dense.get_parameter(name).data = parameter.detach().float()
    wanted = logits(dense)
    unmerged_error, merged_error = relative_error(before, wanted), relative_error(merged, wanted)
    assert unmerged_error < 0.1
    assert merged_error < 2 * unmerged_error


@pytest.mark.parametrize("kind", QUANTIZED)
def test_merging_in_float32_loses_nothing(base: Path, kind: str) -> None:
    model = adapted(base, kind)
    before, name = logits(model, training=True), type(model).__name__
    dense = model.merge_and_unload()
    assert dense is model
    assert not isinstance(dense, LoraModel)
    assert type(dense).__name__ == name
    assert_dense(dense, torch.float32)
    assert all(p.requires_grad for p in dense.parameters())  # as of a dense model, that one may train whole
    # Weights, sums and two layers of products, each rounded once to float32 and summed in another order.
    assert_near(logits(dense), before, torch.float32, factor=64)
    dense.to(torch.bfloat16)  # transformers refuses it to a model that it takes for a quantized one


def test_layers_without_adapter_become_dense_too_and_two_adapters_are_folded(base: Path) -> None:
    model = adapted(base, "nf4", target_modules=["q_proj"])
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(model, seed=1, scale=0.05)
    model.set_adapter(["default", "two"])
    before = logits(model)
    dense = model.merge_and_unload()
    assert_dense(dense, torch.float32)
    assert_near(logits(dense), before, torch.float32, factor=64)


def test_dequantize_alone_keeps_the_adapter_beside(base: Path) -> None:
    model = adapted(base, "nf4-double")
    before = logits(model)
    assert dequantize(model) is model
    assert isinstance(model, LoraModel)
    assert_near(logits(model), before, torch.float32, factor=64)
    model.merge_adapter()
    assert_near(logits(model), before, torch.float32, factor=64)
    model.unmerge_adapter()
    assert_dense(model.unload(), torch.float32)


def test_a_dense_head_that_was_merged_alone_does_not_keep_the_rest_quantized(base: Path) -> None:
    model = adapted(base, "nf4", target_modules=["lm_head"])
    before = logits(model)
    model.merge_adapter()
    dense = model.merge_and_unload()
    assert_dense(dense, torch.float32)
    assert_near(logits(dense), before, torch.float32, factor=64)


def test_skipped_modules_and_tied_heads_stay_what_they_are(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "tied", tied=True)
    model = load(folder, "nf4", llm_int8_skip_modules=["lm_head", "gate_proj"])
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    randomize(apply_lora(model, LoraConfig(r=4)), scale=0.05)
    before = logits(model)
    dense = model.merge_and_unload()
    assert_dense(dense, torch.float32)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert_near(logits(dense), before, torch.float32, factor=64)
    dense.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(dense))


def test_an_adapted_tied_head_needs_untie_as_ever(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "tied", tied=True)
    model = adapted(folder, "nf4", target_modules=["q_proj", "lm_head"])
    before, held = logits(model), bits(model)
    with pytest.raises(MergeError, match="untie=True"):
        model.merge_and_unload()
    assert_same_tensors(bits(model), held)
    dense = model.merge_and_unload(untie=True)
    assert_near(logits(dense), before, torch.float32, factor=64)
    dense.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(dense))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_was_a_transposed_layer_is_one_again(tmp_path: Path, kind: str) -> None:
    """bitsandbytes knows no Conv1D: transformers transposes its weight, and a plain folder wants it back."""
    tiny_gpt2(n_embd=64, n_head=4).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", kind, cls=GPT2LMHeadModel)
    randomize(apply_lora(model, LoraConfig(r=4)), scale=0.05)
    before = logits(model, training=False) if kind == "nf4" else None
    dense = model.merge_and_unload()
    assert type(dense.transformer.h[0].mlp.c_fc) is Conv1D
    assert dense.transformer.h[0].mlp.c_fc.weight.shape == (64, 256)
    if before is not None:
        assert_near(logits(dense), before, torch.float32, factor=64)
    dense.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "out")), logits(dense))


def test_memory_is_one_layer_at_a_time(base: Path) -> None:
    """When the last layer is turned, no other quantized weight is left, and no second dense one was made."""
    model = adapted(base, "nf4")
    packed = [weakref.ref(m.weight) for n, m in model.named_modules() if n.endswith("proj")]
    alive: list[int] = []
    turn = QuantizedStorage.make_dense

    def watched(self: Any, layer: Any, weight: Any) -> None:
        turn(self, layer, weight)
        alive.append(sum(ref() is not None for ref in packed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedStorage, "make_dense", watched)
        model.merge_and_unload()
    assert len(alive) == 14
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 1


def test_nothing_is_changed_where_something_cannot_be_dense(base: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 64, 128
            self.register_buffer("qweight", torch.randint(0, 99, (128, 8), dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], 128)

    model = load(base, "nf4")
    model.model.layers[1].mlp.up_proj = Packed()
    randomize(apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"])))
    before, held = logits(model), bits(model)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj: .*Packed is a quantized layer"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="Nothing was changed"):
        dequantize(model)
    assert_same_tensors(bits(model), held)
    assert torch.equal(logits(model), before)


def test_a_sum_that_float16_cannot_hold_is_refused_before_anything_is_changed(base: Path) -> None:
    model = adapted(base, "nf4", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B["default"].weight[3, 1] = 1e6
    held = bits(model)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj: a merged value is not finite, or too large"):
        model.merge_and_unload()
    assert_same_tensors(bits(model), held)
    assert is_quantized(model)


def test_the_dtype_is_that_of_what_was_not_quantized(base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = adapted(base, "nf4", dtype)
        assert dense_dtype(model) == dtype
        assert_dense(model.merge_and_unload(), dtype)


def test_checking_an_adapter_wants_a_dense_base(base: Path) -> None:
    model = adapted(base, "nf4")
    held = bits(model)
    with pytest.raises(StateError, match="quantized"):
        check_adapter(model, {"input_ids": token_ids()})
    assert_same_tensors(bits(model), held)


# The documented workflow ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A few steps of LoraTrainer over NF4: the folder, the logits, dtypes before and after."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load(base, "nf4", torch.bfloat16)
    before = {n: (p.dtype, p.numel()) for n, p in model.named_parameters()}
    ids = token_ids(8, 12)
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    args = LoraTrainingArguments(
        output_dir=str(folder / "run"), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=4,
        per_device_train_batch_size=4, learning_rate=2e-2, save_strategy="no", eval_strategy="steps", eval_steps=2,
        lora_r=4, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = LoraTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    at_start = {n: (p.dtype, p.numel()) for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    after = {n: (p.dtype, p.numel()) for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.save_model(str(folder / "adapter"))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"folder": folder / "adapter", "model": trainer.model, "dtypes": (before, at_start, after), "loss": losses}


def test_training_over_a_4_bit_base_casts_no_weight(trained: dict[str, Any]) -> None:
    before, at_start, after = trained["dtypes"]
    assert at_start == before
    assert after == before
    assert trained["loss"][-1] < trained["loss"][0]
    model = trained["model"]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    validate_quantization_for_training(model)
    model._hf_peft_config_loaded = False  # what makes the difference
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    del model._hf_peft_config_loaded


def test_peft_loads_what_was_trained_over_nf4(base: Path, trained: dict[str, Any]) -> None:
    import peft

    theirs = peft.PeftModel.from_pretrained(load(base, "nf4", torch.bfloat16), trained["folder"])
    found, wanted = logits(theirs, training=True), logits(trained["model"], training=True)
    exact = logits(LoraModel.from_pretrained(trained["folder"], base_model=load(base, "nf4")), training=True)
    assert_near(found, wanted, torch.bfloat16, factor=16)
    assert relative_error(found, exact) < 2 * relative_error(wanted, exact) + torch.finfo(torch.bfloat16).eps
    ours32 = LoraModel.from_pretrained(trained["folder"], base_model=load(base, "nf4"))
    theirs32 = peft.PeftModel.from_pretrained(load(base, "nf4"), trained["folder"])
    assert_near(logits(ours32, training=True), logits(theirs32, training=True), torch.float32, factor=64)


@pytest.mark.parametrize("kind", ["dense", *QUANTIZED])
def test_an_adapter_trained_over_nf4_goes_onto_every_form_of_the_base(
    base: Path, trained: dict[str, Any], kind: str
) -> None:
    other = load(base, kind)
    dense = LoraModel.from_pretrained(trained["folder"], base_model=other, merge=True)
    assert_dense(dense, torch.float32)
    moved = relative_error(logits(dense), logits(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)))
    assert moved > 0.01


def test_the_documented_road_merges_into_the_bfloat16_base(base: Path, trained: dict[str, Any]) -> None:
    dense = LoraModel.from_pretrained(trained["folder"], base_model=str(base), merge=True, dtype=torch.bfloat16)
    assert_dense(dense, torch.bfloat16)
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layer: Any = trained["model"].model.layers[0].self_attn.q_proj
    update = layer._lora.adapters["default"].scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = plain.model.layers[0].self_attn.q_proj.weight.double() + update.detach().double()
    found = dense.model.layers[0].self_attn.q_proj.weight.double()
    assert ((found - wanted).abs() <= wanted.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-7).all()


def test_a_base_whose_files_are_quantized_is_the_same_base(
    base: Path, tmp_path: Path, trained: dict[str, Any]
) -> None:
    load(base, "nf4", torch.bfloat16).save_pretrained(tmp_path / "packed")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    assert packed.hf_quantizer.pre_quantized
    model = randomize(apply_lora(packed, LoraConfig(r=4)), scale=0.05)
    model.save_pretrained(tmp_path / "adapter")
    before = logits(model, training=True)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=again)
    assert torch.equal(logits(loaded, training=True), before)
    dense = LoraModel.from_pretrained(tmp_path / "adapter", base_model=str(base), merge=True)
    assert_dense(dense, torch.float32)
    LoraModel.from_pretrained(trained["folder"], base_model=packed.unload())
    # Another base of the same kind is still told apart.
    other = save_base(tmp_path / "other-base", seed=7)
    load(other, "nf4", torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="its files"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "other"), device_map="cpu")


def test_a_quantized_base_is_merged_to_a_folder(base: Path, tmp_path: Path, trained: dict[str, Any]) -> None:
    load(base, "nf4-double", torch.bfloat16).save_pretrained(tmp_path / "packed")
    out = merge_to_folder(trained["folder"], tmp_path / "out", base_model=str(tmp_path / "packed"), device_map="cpu")
    model = LlamaForCausalLM.from_pretrained(out)
    assert_dense(model, torch.bfloat16)
    half = merge_to_folder(
        trained["folder"], tmp_path / "half", base_model=str(tmp_path / "packed"), dtype="float16", device_map="cpu"
    )
    assert_dense(LlamaForCausalLM.from_pretrained(half), torch.float16)
    last: dict[str, Any] = {"base_model": str(base), "quantization_config": method("nf4"), "device_map": "cpu"}
    small = merge_to_folder(trained["folder"], tmp_path / "small", **last)
    assert LlamaForCausalLM.from_pretrained(small, device_map="cpu").is_quantized
    with pytest.raises(ConfigError, match="dtype= is for dense"):
        merge_to_folder(trained["folder"], tmp_path / "none", dtype="float16", **last)


def test_rounding_a_merged_weight_to_nf4_again_takes_most_of_the_update_away() -> None:
    """Why merging in place is refused: the figures of docs/quantization.md."""
    kept = share_of_update_kept("nf4", 0.01)
    assert kept < 0.5
    assert share_of_update_kept("int8", 0.01) < 1.0


def share_of_update_kept(kind: str, size: float) -> float:
    """1 less the part of an update, of relative size `size`, that is wrong after quantizing the sum once more."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as B

    torch.manual_seed(0)
    weight = torch.randn(256, 512)

    def grid(w: Tensor) -> Tensor:
        if kind == "int8":
            scale = w.abs().amax(1, keepdim=True) / 127
            return (w / scale).round() * scale
        packed, state = B.quantize_4bit(w, quant_type=kind)
        return B.dequantize_4bit(packed, state)

    weight = grid(weight)
    update = torch.randn(256, 8) @ torch.randn(8, 512)
    update *= size * weight.norm() / update.norm()
    return 1 - float(((grid(weight + update) - weight) - update).norm() / update.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_a_fresh_process(Path(sys.argv[1]), sys.argv[2:])
