"""accelerate's hooks, which keep a `forward` on the instance, and weights that are offloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers import assert_same_tensors, backward, batch_for, randomize, snapshot, tiny_bert, tiny_llama
from safetensors.torch import load_file
from torch import nn

from hf_lora import AdapterFileError, LoraConfig, LoraError, LoraModel, MergeError, TargetError, apply_lora
from hf_lora.adapt.walk import adapter_layers


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def linears(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]


def expected() -> Any:
    return randomize(apply_lora(tiny_llama(), LoraConfig(r=4)))


def test_hooks_that_were_there_before_run_and_the_adapter_acts() -> None:
    model, hook = tiny_llama(), Counting()
    for layer in linears(model):
        add_hook_to_module(layer, hook)
    apply_lora(model, LoraConfig(r=4))
    randomize(model)
    reference, batch = expected(), batch_for(model)
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert hook.calls == len(linears(model))
    assert_same_tensors(backward(model, batch), backward(reference, batch))
    plain = model.unload()
    assert {type(m) for m in linears(plain)} == {nn.Linear}
    hook.calls = 0
    assert torch.equal(plain(**batch).logits, tiny_llama()(**batch).logits)
    assert hook.calls == len(linears(plain))


def test_hooks_that_come_after_run_and_the_adapter_acts() -> None:
    model, hook = expected(), Counting()
    batch = batch_for(model)
    y = model(**batch).logits
    for layer in linears(model):
        add_hook_to_module(layer, hook)
    assert torch.equal(model(**batch).logits, y)
    assert hook.calls == len(linears(model))
    merged = model.merge_and_unload()
    assert {type(m) for m in linears(merged)} == {nn.Linear}
    hook.calls = 0
    assert torch.allclose(merged(**batch).logits, y, atol=1e-4)
    assert hook.calls == len(linears(merged))


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_a_hook_that_was_removed_hides_nothing(when: str) -> None:
    """accelerate leaves the bound forward on the instance."""
    model = tiny_llama()
    batch = batch_for(model)
    for layer in linears(model):
        add_hook_to_module(layer, Counting())
        if when == "before":
            remove_hook_from_module(layer)
    apply_lora(model, LoraConfig(r=4))
    randomize(model)
    y = expected()(**batch).logits
    assert torch.equal(model(**batch).logits, y)
    if when == "between":
        for layer in linears(model):
            remove_hook_from_module(layer)
        assert torch.equal(model(**batch).logits, y)
    base = tiny_llama().requires_grad_(False)(**batch).logits
    plain = model.unload()
    assert torch.equal(plain(**batch).logits, base)
    if when == "after":
        for layer in linears(plain):
            remove_hook_from_module(layer)
        assert torch.equal(plain(**batch).logits, base)


def test_a_foreign_forward_on_the_instance_is_refused() -> None:
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj: its forward was replaced on the instance"):
        apply_lora(model, LoraConfig(target_modules=["q_proj"]))
    assert not isinstance(model, LoraModel)
    assert not adapter_layers(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_an_offloaded_base_runs_trains_and_refuses_to_fold(make: Any) -> None:
    reference = randomize(apply_lora(make(), LoraConfig(r=4, modules_to_save=[])))
    batch = batch_for(reference)
    model = make()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    apply_lora(model, LoraConfig(r=4, modules_to_save=[]))
    randomize(model)
    assert not any(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    model(**batch).loss.backward()
    reference(**batch).loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_same_tensors({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)  # type: ignore[misc]
    with pytest.raises(MergeError, match="its weight is offloaded"):
        model.merge_adapter()
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    plain = model.unload()
    base = make().requires_grad_(False)
    assert torch.equal(plain(**batch).logits, base(**batch).logits)


def test_a_dispatched_model_folds_what_is_in_memory_and_refuses_the_rest() -> None:
    model = tiny_llama()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        randomize(apply_lora(model, LoraConfig(r=4)))
        reference = expected()
        batch = batch_for(model)
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
        before = snapshot(reference)
        with pytest.raises(MergeError) as error:
            model.merge_adapter()
        assert "model.layers.1.mlp.down_proj" in str(error.value)
        assert "model.layers.0" not in str(error.value)
        found = snapshot(model)
        assert all(torch.equal(found[n], before[n]) for n in before if "layers.0" in n)


def test_a_model_that_is_offloaded_with_its_adapter_runs_saves_and_loses_nothing(tmp_path: Path) -> None:
    reference = randomize(apply_lora(tiny_bert(), LoraConfig(r=4, bias="all")))  # with a head of its own
    batch, y = batch_for(reference), reference(**batch_for(reference)).logits
    reference.save_pretrained(tmp_path / "before")
    model = copy.deepcopy(reference)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(**batch).logits, y)
    model.save_pretrained(tmp_path / "after")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("after", "before"))
    assert_same_tensors(found, expected)
    with pytest.raises(MergeError, match="query: its weight is offloaded"):
        model.merge_adapter()
    with pytest.raises(AdapterFileError, match="the adapter 'default' is offloaded; load its values before"):
        model.load_adapter_weights(tmp_path / "before")
    assert torch.equal(model(**batch).logits, y)
    with pytest.raises(LoraError, match="classifier would be trained whole but is offloaded"):
        model.load_adapter(tmp_path / "before", "second")
    without_head = randomize(apply_lora(tiny_bert(), LoraConfig(r=4, bias="all", modules_to_save=[])), 5)
    without_head.save_pretrained(tmp_path / "second")
    model.load_adapter(tmp_path / "second", "second")  # its tensors are in memory
    assert torch.equal(model(**batch).logits, without_head(**batch).logits)
    assert torch.equal(model.unload()(**batch).logits, tiny_bert()(**batch).logits)
