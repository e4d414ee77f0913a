"""Every way to call a plain layer works on an adapted one, for every shape: the reference is the folded weight."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from helpers import assert_near, relative_error
from shapes_under_test import ADDITIVE, BY_NAME, CASES, Case, adapted, exact_weight, plain_layer
from torch import Tensor, nn

from hf_lora import LoraConfig
from hf_lora.adapt.inject import inject
from hf_lora.layers.class_swap import unwrap_class

CPU = torch.device("cpu")


def by_keyword(model: Any, x: Tensor) -> Tensor:
    plain: Any = unwrap_class(type(model.layer))
    return model.layer(**{list(inspect.signature(plain.forward).parameters)[1]: x})


def traced(model: Any, x: Tensor) -> Tensor:
    return torch.jit.trace(model, x, check_trace=False)(x)


def traced_without_gradients(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.jit.trace(model, x, check_trace=False)(x)


def exported(model: Any, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,)).module()(x)


def called_as_a_function(model: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def offloaded_to_memory(model: Any, x: Tensor) -> Tensor:
    cpu_offload(model, execution_device=CPU)
    assert all(p.is_meta for p in model.parameters())
    return model(x)


CALLS: list[Callable[[Any, Tensor], Tensor]] = [
    by_keyword, traced, traced_without_gradients, exported, called_as_a_function, offloaded_to_memory,
]  # fmt: skip


def expected(case: Case, model: Any, x: Tensor) -> Tensor:
    plain = plain_layer(case, model.layer, exact_weight(case, model))
    return plain(x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_call_gives_the_output_of_the_folded_weight(case: Case, training: bool) -> None:
    model = adapted(case, ADDITIVE, torch.float32, 2, bias="none").train(training)
    x = case.input()
    wanted = expected(case, model, x)
    for call in CALLS:
        assert_near(call(copy.deepcopy(model), x), wanted, torch.float32, 64)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "embedding"], ids=lambda case: case.name)
def test_forward_mode_derivatives_are_those_of_the_folded_weight(case: Case) -> None:
    model = adapted(case, ADDITIVE, torch.float32, 1).train()
    x = case.input()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    plain = plain_layer(case, model.layer, exact_weight(case, model))
    wanted = torch.func.jvp(plain, (x.double(),), (direction.double(),))[1]
    assert_near(torch.func.jvp(model, (x,), (direction,))[1], wanted, torch.float32, 64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
    assert found.tangent is not None
    assert_near(found.tangent, wanted, torch.float32, 64)


def test_an_unknown_keyword_is_an_error_as_in_the_plain_layer() -> None:
    model = adapted(BY_NAME["linear"], ADDITIVE, torch.float32, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'"):
        model.layer(inputs=BY_NAME["linear"].input())


def test_a_bias_and_a_whole_module_are_read_from_where_they_were_offloaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    inject(model, LoraConfig(r=2, target_modules=["0"], bias="all", modules_to_save=["2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(4, 8)
    wanted = model(x)
    disk_offload(model, str(tmp_path), execution_device=CPU)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(x), wanted)


class Reads(nn.Module):
    """Reads the weight of its head, as some parents do."""

    how = "product"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.how == "product":
            return F.linear(h, self.head.weight, self.head.bias)
        if self.how == "cast":
            return self.head(h.to(self.head.weight.dtype))
        return self.head(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["product", "cast", "call"])
def test_a_parent_that_reads_a_trained_head_runs_in_the_dtype_of_the_base(how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Reads().to(dtype)
    model.how = how
    x = torch.randn(5, 8).to(dtype)
    plain = copy.deepcopy(model).double()
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    y = model(x)
    assert y.dtype == dtype
    assert_near(y, plain(x.double()), dtype, 4)
    y.float().square().sum().backward()
    copies: Any = model.head
    master = copies.copies["default"].weight
    assert master.dtype == torch.float32
    plain(x.double()).square().sum().backward()
    assert relative_error(master.grad, plain.head.weight.grad) < 32 * torch.finfo(dtype).eps
