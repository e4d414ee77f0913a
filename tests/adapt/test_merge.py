"""Folding: exact in every dtype and layout, also where base and update cancel, in memory of a few blocks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lora import LoraConfig, MergeError, apply_lora
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.dequantize import BLOCK_ELEMENTS
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import adapter_tensors
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter
from hf_lora.layers.storages import DenseStorage, fits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and not any(result is a for a in args):
            views = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if result.untyped_storage().data_ptr() not in views:
                self.bytes = max(self.bytes, result.numel() * result.itemsize)
        return result


def linear(inputs: int, outputs: int, dtype: torch.dtype, adapters: int = 1) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False).to(dtype)})
    for i in range(adapters):
        inject(model, LoraConfig(r=4, lora_alpha=3 + i, target_modules=["layer"]), f"a{i}")
    return randomize(model, scale=0.1)


def exact_sum(model: Any, names: list[str]) -> Tensor:
    layer = model["layer"]
    total = layer.weight.detach().double()
    for name in names:
        a, b = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
        total = total + layer._lora.adapters[name].scaling * (b @ a)
    return total


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_that_cancels_is_the_float64_result_rounded_once(dtype: torch.dtype, adapters: int) -> None:
    """The base is the update's negative but for a bit here and there: float32 products would leave noise."""
    model = linear(96, 80, dtype, adapters)
    names = [f"a{i}" for i in range(adapters)]
    layer = model["layer"]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight.copy_(-exact_sum(model, names))
    wanted = exact_sum(model, names)
    assert wanted.abs().max() < 2 * torch.finfo(dtype).eps * layer.weight.abs().max(), "it must nearly cancel"
    merge(model, names)
    # torch may choose another order of the float64 sums; that shows far below the rounding to any of these dtypes
    noise = 64 * torch.finfo(torch.float64).eps
    assert ((layer.weight.double() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps / 2 + noise + 2**-25).all()
    if dtype == torch.bfloat16:
        assert torch.equal(layer.weight, wanted.to(dtype))


def test_a_weight_in_another_memory_layout_is_folded_too() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"layer": nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)})
    inject(model, LoraConfig(r=4, target_modules=["layer"]))
    randomize(model)
    layer = model["layer"]
    assert not layer.weight.is_contiguous()
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    wanted = layer.weight.detach() + 2 * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    merge(model)
    assert torch.allclose(layer.weight, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_for_good_allocates_a_block_at_a_time(dtype: torch.dtype) -> None:
    """No tensor that a merge makes is larger than a block in float64, though the weight is 12 times that."""
    model = linear(2048, 12 * BLOCK_ELEMENTS // 2048, dtype)
    with Largest() as largest:
        merge(model, keep=False)
    assert largest.bytes == BLOCK_ELEMENTS * 8
    assert model["layer"].weight.numel() == 12 * BLOCK_ELEMENTS


class Live(TorchDispatchMode):
    """The most bytes of float64 tensors that were alive at once."""

    now = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and result.dtype == torch.float64 and not any(result is a for a in args):
            size = result.numel() * result.itemsize
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.freed, size)
        return result

    def freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_merge_holds_the_float64_factors_of_one_layer_at_a_time(adapters: int) -> None:
    found = []
    for layers in (2, 6):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
        names = ["default", "other"][:adapters]
        for name in names:
            inject(model, LoraConfig(r=16, target_modules=[str(i) for i in range(layers)]), name)
        set_active(model, require_state(model, "test"), tuple(names))
        randomize(model)
        with Live() as live:
            merge(model, keep=False)
        found.append(live.most)
    assert found[0] == found[1] > 0


def test_fits_is_exact_at_the_ends_of_a_dtype() -> None:
    for dtype in (*DTYPES, torch.float64):
        top = torch.finfo(dtype).max
        assert fits(torch.full((64,), top, dtype=torch.float64), dtype)  # their norm is larger than the dtype holds
        for value in (top * 1.01, torch.inf, -torch.inf, torch.nan):
            block = torch.zeros(64, dtype=torch.float64)
            block[17] = value
            assert not fits(block, dtype), (dtype, value)
        assert not fits(torch.tensor([torch.inf, -torch.inf], dtype=dtype), dtype)
        assert fits(torch.empty(0, dtype=dtype), dtype)


def test_a_base_that_is_not_finite_is_refused_without_a_false_promise() -> None:
    model = linear(16, 16, torch.bfloat16)
    with torch.no_grad():
        model["layer"].weight[3, 3] = torch.inf
    with pytest.raises(MergeError, match="weights are unchanged"):
        merge(model, keep=True)
    with pytest.raises(MergeError, match="reload the base"):
        merge(model, keep=False)


def test_a_merge_that_breaks_off_leaves_every_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=2)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    own, calls = DenseStorage.write, []

    def write(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        own(self, *args)

    monkeypatch.setattr(DenseStorage, "write", write)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter()
    assert_same_tensors(dict(model.named_parameters()), before)
    monkeypatch.undo()
    model.merge_adapter()


def test_the_tensors_of_adapters_are_found_in_one_pass() -> None:
    """Factors, biases and whole modules, of the named adapters alone; each once."""
    model = apply_lora(tiny_llama(), LoraConfig(r=2, bias="lora_only", modules_to_save=["lm_head"]), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    named = {n: p for n, p in model.named_parameters() if "lora_" in n or ".copies." in n}
    for names in (["one"], ["two"], ["one", "two"]):
        found = [id(p) for _, p in adapter_tensors(model, names)]
        wanted = {id(p) for n, p in named.items() if any(f".{name}." in n for name in names)}
        assert len(found) == len(set(found))
        assert set(found) == wanted


def test_loading_an_adapter_draws_no_random_number(tmp_path: Any) -> None:
    model = linear(16, 16, torch.float32)
    save_adapter(model, tmp_path, "a0")
    before = torch.get_rng_state()
    load_adapter(model, tmp_path, "loaded")
    assert torch.equal(torch.get_rng_state(), before)
    layer = model["layer"]
    assert torch.equal(layer.lora_A["loaded"].weight, layer.lora_A["a0"].weight)
    assert torch.equal(layer.lora_B["loaded"].weight, layer.lora_B["a0"].weight)
