"""`fully_shard` in one process: gradients reach the real parameters, the adapter acts, classes come off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import batch_for, randomize, relative_error, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_lora import LoraConfig, LoraModel, MergeError, StateError, apply_lora
from hf_lora.layers.base import LoraLayer


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store: Path = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def shard(model: Any, mesh: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make(**config: Any) -> Any:
    return randomize(apply_lora(tiny_llama(), LoraConfig(r=4, **config)))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_reach_the_real_parameters_and_the_adapter_acts(mesh: Any, method: str) -> None:
    reference, model = make(method=method), shard(make(method=method), mesh)
    batch = batch_for(model)
    assert isinstance(model, FSDPModule)
    assert isinstance(model, LoraModel)
    assert relative_error(model(**batch).logits, reference(**batch).logits) < 1e-6
    model(**batch).loss.backward()
    reference(**batch).loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert isinstance(gradient, DTensor), name
        assert relative_error(gradient.full_tensor(), expected[name]) < 1e-5, name  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(**batch).loss.item()
    optimizer.step()
    assert model(**batch).loss.item() < before


def test_switching_and_disabling_act_on_a_sharded_model(mesh: Any) -> None:
    reference = make()
    reference.add_adapter("second", LoraConfig(r=2))
    randomize(reference, 3)
    model = make()
    model.add_adapter("second", LoraConfig(r=2))
    shard(randomize(model, 3), mesh)
    batch = batch_for(model)
    for names in ("default", "second", ["default", "second"]):
        model.set_adapter(names)
        reference.set_adapter(names)
        assert relative_error(model(**batch).logits, reference(**batch).logits) < 1e-6
    with model.disable_adapter(), reference.disable_adapter():
        assert relative_error(model(**batch).logits, reference(**batch).logits) < 1e-6


def test_folding_sharded_weights_is_refused_by_name(mesh: Any) -> None:
    model = shard(make(), mesh)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj: its weight is now a DTensor"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="DTensor"):
        model.merge_and_unload()
    assert isinstance(model, LoraModel)


def test_unloading_leaves_fsdps_class_on(mesh: Any) -> None:
    model = shard(make(), mesh)
    batch = batch_for(model)
    plain = model.unload()
    assert isinstance(plain, FSDPModule)
    assert not isinstance(plain, LoraModel)
    assert not any(isinstance(m, LoraLayer) for m in plain.modules())
    assert isinstance(plain, type(tiny_llama()))
    assert callable(plain.unshard)
    assert all(isinstance(block, FSDPModule) for block in plain.model.layers)
    assert relative_error(plain(**batch).logits, tiny_llama()(**batch).logits) < 1e-6


def test_a_layer_that_is_sharded_itself_gets_its_class_back(mesh: Any) -> None:
    """Here FSDP's class stands right on top of the extended layer's."""
    model = make()
    layer = model.model.layers[0].mlp.down_proj
    fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = batch_for(model)
    assert relative_error(model(**batch).logits, make()(**batch).logits) < 1e-6
    model.unload()
    assert isinstance(layer, FSDPModule)
    assert isinstance(layer, torch.nn.Linear)
    assert not isinstance(layer, LoraLayer)
    assert relative_error(model(**batch).logits, tiny_llama()(**batch).logits) < 1e-6


def test_lora_after_sharding_is_refused(mesh: Any) -> None:
    model = shard(tiny_llama(), mesh)
    with pytest.raises(StateError, match=r"already sharded[\s\S]*Call apply_lora before fully_shard"):
        apply_lora(model)
    assert not isinstance(model, LoraModel)
