"""The law: a layer computes what a plain layer computes whose weight is `fold(read(layer))`. Held to float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, folded, randomize, snapshot
from shapes_under_test import (
    ADDITIVE,
    BIASED,
    BY_NAME,
    CASES,
    DORA,
    LORA_BIAS,
    LORA_FA,
    TOY,
    TOY_CASES,
    Case,
    Holder,
    adapted,
    exact_weight,
    plain_layer,
)
from torch import nn

from hf_lora import LoraConfig, MergeError, StateError
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import eject, inject
from hf_lora.adapt.merge import disabled, merge, unmerge
from hf_lora.adapt.state import require_state
from hf_lora.layers.contract import Method

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = [(c, ADDITIVE, n) for c in CASES for n in (1, 2)] + [(c, TOY, 1) for c in TOY_CASES]
GRID += [(c, DORA, 1) for c in CASES] + [(c, LORA_BIAS, 2) for c in BIASED] + [(BY_NAME["linear"], LORA_FA, 2)]
IDS = [f"{c.name}-{m.kind}-{n}" for c, m, n in GRID]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "method", "adapters"), GRID, ids=IDS)
def test_output_is_that_of_the_folded_weight(case: Case, method: Method, adapters: int, dtype: torch.dtype) -> None:
    model = adapted(case, method, dtype, adapters)
    layer, x = model.layer, case.input(dtype)
    weight = exact_weight(case, model)
    expected = plain_layer(case, layer, weight)(
        case.input(torch.float64) if x.is_floating_point() is False else x.double()
    )

    y = model(x)
    assert y.dtype == dtype
    base = case.layer(dtype)(x)
    assert y.shape == base.shape
    assert (y - base).norm() > 0.05 * base.norm(), "the adapter must act, or the comparison says nothing"
    assert_near(y, expected, dtype, factor=6)

    rows = [(rows, block) for rows, block in folded(layer, layer._lora.names)]
    assert_near(torch.cat([block for _, block in rows]), weight, torch.float32)
    before = snapshot(model)
    merge(model)
    assert layer.weight.dtype == dtype
    assert_near(layer.weight, weight, dtype, factor=1)
    assert torch.equal(model(x), plain_with(case, layer)(x)), "a merged layer is a plain layer"
    with disabled(model):
        assert torch.equal(model(x), base)
    unmerge(model)
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(model(x), y)
    plain = eject(model).layer
    assert type(plain) is type(case.layer())
    assert torch.equal(plain(x), base)


def plain_with(case: Case, layer: Any) -> nn.Module:
    plain = case.layer(layer.weight.dtype)
    plain.weight.copy_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        plain.bias.copy_(layer.bias)
    return plain


@pytest.mark.parametrize(
    "autocast", [None, torch.bfloat16, torch.float16], ids=["plain", "bf16-autocast", "fp16-autocast"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "method", "adapters"), GRID, ids=IDS)
def test_a_fresh_adapter_changes_no_bit(
    case: Case, method: Method, adapters: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    x = case.input(dtype)
    model = adapted(case, method, dtype, adapters, fresh=True, lora_dropout=0.0 if method is TOY else 0.5).train()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        base = case.layer(dtype)(x)
        y = model(x)
    assert y.dtype == base.dtype
    assert torch.equal(y, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_under_autocast_the_output_is_the_bases_dtype_and_near(case: Case, dtype: torch.dtype) -> None:
    model = adapted(case, ADDITIVE, dtype, 2)
    x = case.input(torch.float32 if dtype == torch.float32 else dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        base = case.layer(dtype)(x)
    assert y.dtype == base.dtype
    expected = plain_layer(case, model.layer, exact_weight(case, model))(x.double() if x.is_floating_point() else x)
    assert_near(y, expected, torch.bfloat16, factor=4)


@pytest.mark.parametrize("required", [True, False])
def test_unload_restores_class_and_requires_grad(required: bool) -> None:
    for case in CASES:
        model = Holder(case.layer().requires_grad_(required))
        before = {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
        inject(model, LoraConfig(target_modules=["layer"]), "default")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "layer.lora_A.default.weight", "layer.lora_B.default.weight",
        ]  # fmt: skip
        assert isinstance(model.layer, type(case.layer()))
        assert type(model.layer).__name__ == type(case.layer()).__name__
        attributes = set(case.layer().__dict__) | {"forward"}
        eject(model)
        assert type(model.layer) is type(case.layer())
        assert {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()} == before
        assert set(model.layer.__dict__) <= attributes
        assert set(model.layer._modules) == set()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_merged_bf16_weight_is_rounded_once(seed: int) -> None:
    """At most one unit in the last place from the float64 result rounded to bf16, in under 1e-4 of the elements."""
    torch.manual_seed(seed)
    model = Holder(nn.Linear(1024, 1024, bias=False).to(torch.bfloat16))
    inject(model, LoraConfig(r=16, target_modules=["layer"]), "default")
    randomize(model, seed, scale=0.05)
    a, b = (
        model.layer.lora_A["default"].weight.detach().double(),
        model.layer.lora_B["default"].weight.detach().double(),
    )
    base = model.layer.weight.detach().clone()
    exact = (base.double() + 2 * b @ a).to(torch.bfloat16)
    merge(model)
    found = model.layer.weight.detach()
    assert (found != base).float().mean() > 0.5
    assert (found != exact).float().mean() < 1e-4
    unit = torch.nextafter(exact.abs(), torch.tensor(torch.inf, dtype=torch.bfloat16)).double() - exact.abs().double()
    assert ((found.double() - exact.double()).abs() <= unit).all()


def test_folding_goes_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks cover the weight once, and none is as large as it is."""
    monkeypatch.setattr("hf_lora.adapt.dequantize.BLOCK_ELEMENTS", 100)
    for case in CASES:
        model = adapted(case, ADDITIVE, torch.float32, 2)
        blocks = list(folded(model.layer, model.layer._lora.names))
        assert len(blocks) > 1
        assert [r.start for r, _ in blocks] == [0, *(r.stop for r, _ in blocks[:-1])]
        assert_near(torch.cat([b for _, b in blocks]), exact_weight(case, model), torch.float32)


def test_a_value_too_large_for_fp16_is_refused_and_undone() -> None:
    model = adapted(BY_NAME["linear"], ADDITIVE, torch.float16, 1)
    with torch.no_grad():
        model.layer.lora_B["one"].weight[-1] = 1e6
    before = snapshot(model)
    for keep in (True, False):
        with pytest.raises(MergeError, match="layer: a merged value is not finite"):
            merge(model, keep=keep)
        assert_same_tensors(snapshot(model), before)
        assert not require_state(model, "test").activity.merged


def test_a_nan_in_a_factor_is_refused_by_name() -> None:
    model = adapted(BY_NAME["linear"], ADDITIVE, torch.float32, 2)
    with torch.no_grad():
        model.layer.lora_A["two"].weight[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"adapter 'two': layer\.lora_A\.weight holds NaN"):
        merge(model)


def test_methods_that_do_not_add_up_are_refused_together() -> None:
    case = BY_NAME["linear"]
    model = Holder(case.layer())
    for name, method in (("toy", TOY), ("plain", ADDITIVE), ("toy2", TOY)):
        inject(model, LoraConfig(target_modules=["layer"], method=method.kind), name)
    randomize(model)
    state = require_state(model, "test")
    for names in (("toy", "plain"), ("toy", "toy2")):
        with pytest.raises(StateError, match=r"layer: .* act.* together"):
            set_active(model, state, names)
    assert state.activity.active == ("toy2",)
    for name in ("toy", "plain"):  # one at a time, each with its own method
        set_active(model, state, (name,))
        weight = merge_exactly(case, model, name)
        assert_near(
            model(case.input()), plain_layer(case, model.layer, weight)(case.input().double()), torch.float32, 6
        )


def merge_exactly(case: Case, model: Any, name: str) -> torch.Tensor:
    (_, block), *_ = folded(model.layer, (name,))
    return block.double()


def test_the_toys_magnitude_is_a_master_too() -> None:
    """A method's own factors have what A and B have: float32, a gradient, a place in the file."""
    from hf_lora.adapt.walk import parts

    model = adapted(BY_NAME["linear"], TOY, torch.bfloat16, 1)
    model.to(torch.bfloat16)
    magnitude = model.layer.lora_magnitude_vector["one"].weight
    assert magnitude.dtype == torch.float32
    model(BY_NAME["linear"].input(torch.bfloat16)).float().square().sum().backward()
    assert magnitude.grad is not None
    assert magnitude.grad.abs().sum() > 0
    found = [spec.key for part in parts(model, "one") for spec, _ in part.tensors()]
    assert found == ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    eject(model)
    assert not list(model.layer._modules)
