"""Factors, heads and trained biases are float32 masters whatever happens to the model; the output keeps its dtype."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapter_gradients, assert_near, batch_for, randomize, tiny_bert, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lora import LoraConfig, apply_lora


def model_with_all_kinds() -> Any:
    """Factors, a head and biases of two adapters."""
    model = apply_lora(tiny_bert(), LoraConfig(r=4, bias="all"))
    model.add_adapter("five", LoraConfig(r=2), num_labels=5)
    return randomize(model)


def masters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n or ".copies." in n}


def assign_from_file(dtype: torch.dtype) -> Callable[[Any, Path], Any]:
    def act(model: Any, folder: Path) -> Any:
        file = folder / "whole.safetensors"
        save_file({n: t.to(dtype).clone() for n, t in model.state_dict().items() if t.is_floating_point()}, file)
        result = model.load_state_dict(load_file(file), strict=False, assign=True)
        assert not result.unexpected_keys
        return model

    return act


CASTS: dict[str, Callable[[Any, Path], Any]] = {
    "to(bf16)": lambda m, _: m.to(torch.bfloat16),
    "half()": lambda m, _: m.half(),
    "bfloat16()": lambda m, _: m.bfloat16(),
    "double()": lambda m, _: m.double(),
    "to(device, dtype)": lambda m, _: m.to("cpu", torch.bfloat16),
    "deepcopy": lambda m, _: copy.deepcopy(m.to(torch.bfloat16)),
    "assign a bf16 file": assign_from_file(torch.bfloat16),
    "assign an fp16 file": assign_from_file(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_masters_stay_float32(cast: str, tmp_path: Path) -> None:
    model = model_with_all_kinds()
    before = {n: t.detach().clone() for n, t in masters(model).items()}
    assert len(before) > 40
    result = CASTS[cast](model, tmp_path)
    after = masters(result)
    assert after.keys() == before.keys()
    assert {n: t.dtype for n, t in after.items()} == dict.fromkeys(after, torch.float32)
    base = {t.dtype for n, t in result.named_parameters() if n not in after}
    assert base != {torch.float32}
    if "assign" not in cast:  # a cast and back would have lost bits
        assert all(torch.equal(after[n], t) for n, t in before.items())


def test_masters_survive_meta_and_to_empty() -> None:
    model = model_with_all_kinds().to("meta").to(torch.bfloat16)
    assert {t.dtype for t in masters(model).values()} == {torch.float32}
    model.to_empty(device="cpu")
    assert {(t.dtype, t.device.type) for t in masters(model).values()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2], ids=["bert", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_with_float32_adapters(make: Callable[[], Any], dtype: torch.dtype) -> None:
    """Output dtype is the base's; values and gradients are near those of the float32 model with the same bits."""
    model = randomize(apply_lora(make(), LoraConfig(r=4)), scale=0.1)
    model.to(dtype)
    batch = batch_for(model)
    exact = copy.deepcopy(model)
    exact.to(torch.float32)
    output = model(**batch)
    assert output.logits.dtype == dtype
    assert_near(output.logits, exact(**batch).logits, dtype, factor=16)
    output.loss.backward()
    exact(**batch).loss.backward()
    found, expected = adapter_gradients(model), adapter_gradients(exact)
    assert found.keys() == expected.keys()
    assert {g.dtype for g in found.values()} == {torch.float32}
    together = torch.cat([g.flatten() for g in found.values()])
    assert_near(together, torch.cat([g.flatten() for g in expected.values()]), dtype, factor=64)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2], ids=["bert", "llama", "gpt2"])
def test_float32_under_bf16_autocast_has_the_bases_dtypes(make: Callable[[], Any]) -> None:
    base = make()
    batch = batch_for(base)
    seen: dict[str, torch.dtype] = {}

    def watch(model: nn.Module) -> dict[str, torch.dtype]:
        seen.clear()
        hooks = [
            m.register_forward_hook(lambda _m, _a, y, n=n: seen.update({n: y.dtype}))
            for n, m in model.named_modules()
            if isinstance(getattr(m, "weight", None), Tensor) and "lora_" not in n
        ]
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        for hook in hooks:
            hook.remove()
        return dict(seen)

    expected = watch(base)
    model = randomize(apply_lora(base, LoraConfig(r=4, modules_to_save=[])))
    assert watch(model) == expected
    assert torch.bfloat16 in expected.values()


class Casts(TorchDispatchMode):
    """Counts conversions to another dtype, by the shape of what is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") not in (None, args[0].dtype):
            self.counted[tuple(args[0].shape)] += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama], ids=["bert", "llama"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_under_autocast_x_is_cast_no_more_often_than_in_the_frozen_base(
    make: Callable[[], Any], adapters: int
) -> None:
    base = make()
    batch = batch_for(base, labels=False)
    rows = tuple(batch["input_ids"].shape)

    def activations_cast(model: nn.Module) -> int:
        counter = Casts()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), counter:
            model(**batch)
        return sum(n for shape, n in counter.counted.items() if shape[:2] == rows)

    expected = activations_cast(base)
    assert expected > 0
    apply_lora(base, LoraConfig(r=4, modules_to_save=[]))
    if adapters == 2:
        base.add_adapter("second", LoraConfig(r=2, modules_to_save=[]))
        base.set_adapter(["default", "second"])
    randomize(base)
    assert activations_cast(base) <= expected


def test_a_head_casts_up_and_its_output_down() -> None:
    model = randomize(apply_lora(tiny_bert().to(torch.bfloat16)))
    batch = batch_for(model)
    head = model.classifier.copies["default"]
    assert head.weight.dtype == torch.float32
    seen = []
    head.register_forward_hook(lambda _m, args, y: seen.append((args[0].dtype, y.dtype)))
    output = model(**batch)
    assert seen == [(torch.float32, torch.float32)]
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert head.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).logits.dtype == torch.bfloat16


def test_small_steps_are_not_lost_on_a_bf16_base() -> None:
    """A learning rate of 1e-5 moves factors and head; in bf16 it would round away."""
    model = randomize(apply_lora(tiny_bert().to(torch.bfloat16)))
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        model(**batch_for(model)).loss.backward()
        optimizer.step()
    moved = {n: float((p.detach() - values[n]).abs().max()) for n, p in model.named_parameters() if p.requires_grad}
    assert min(moved.values()) > 1e-5
