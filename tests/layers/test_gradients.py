"""Gradients of factors against float64 autograd of the written formula; grouped convolutions; dropout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, randomize, snapshot
from shapes_under_test import ADDITIVE, BY_NAME, CASES, TOY, TOY_CASES, Case, Holder, adapted, exact_weight
from torch import Tensor, nn

from hf_lora import LoraConfig, MergeError, TargetError
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter
from hf_lora.layers.contract import Method
from hf_lora.layers.dropout import draw_mask, dropped, dropped_indices

GRID = [(c, ADDITIVE, 2) for c in CASES] + [(c, TOY, 1) for c in TOY_CASES]
IDS = [f"{c.name}-{m.kind}" for c, m, _ in GRID]


def exact_gradients(case: Case, model: Any, x: Tensor) -> dict[str, Tensor]:
    """Gradients of sum(y²)/2 in float64, with y computed by the plain layer from the formula's weight."""
    double = copy.deepcopy(model)
    for module in double.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().double())
    weight = differentiable_weight(case, double)
    plain: Any = case.layer().double()
    plain.padding_idx = None  # the tests say themselves which gradient the padding token does not get
    x = x if not x.is_floating_point() else x.double()
    bias = getattr(double.layer, "bias", None)
    values = {"weight": weight} | ({"bias": bias.detach()} if bias is not None else {})
    y = torch.func.functional_call(plain, values, (x,))
    (y.square().sum() / 2).backward()
    return {n: p.grad for n, p in double.named_parameters() if p.grad is not None and "lora_" in n}


def differentiable_weight(case: Case, model: Any) -> Tensor:
    layer = model.layer
    weight = layer.weight.detach()
    for name in layer._lora.names:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight = weight + 6 / a.shape[0] * case.delta(a, b)
        if layer._lora.adapters[name].method.kind == "toy":
            norm = case.norm(weight)
            weight = weight * layer.lora_magnitude_vector[name].weight.view_as(norm) / norm
    return weight


@pytest.mark.parametrize(("case", "method", "adapters"), GRID, ids=IDS)
def test_gradients_are_those_of_the_formula(case: Case, method: Method, adapters: int) -> None:
    model, x = adapted(case, method, torch.float32, adapters), case.input()
    expected = exact_gradients(case, model, x)
    model.train()
    (model(x).square().sum() / 2).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if case.name in ("embedding-padding", "embedding-scaled") and "lora_A" in name:
            # What the padding token looks up gets no gradient, as in the plain layer and in PEFT's.
            assert gradient[:, 1].abs().sum() == 0
            expected[name][:, 1] = 0
        assert_near(gradient, expected[name], torch.float32, factor=16)


def test_the_input_gets_the_gradient_of_the_folded_layer() -> None:
    for name in ("linear", "transposed", "conv2d-reflect", "conv3d"):
        case = BY_NAME[name]
        model, x = adapted(case, ADDITIVE, torch.float32, 2), case.input().requires_grad_(True)
        model(x).square().sum().backward()
        exact = x.detach().double().requires_grad_(True)
        bias = model.layer.bias.double()
        weights = {"weight": exact_weight(case, model), "bias": bias}
        torch.func.functional_call(case.layer().double(), weights, (exact,)).square().sum().backward()
        assert x.grad is not None
        assert exact.grad is not None
        assert_near(x.grad, exact.grad, torch.float32, factor=16)


def test_gradients_under_bf16_autocast_are_near_and_float32() -> None:
    for case in CASES:
        model, x = adapted(case, ADDITIVE, torch.float32, 1), case.input()
        expected = exact_gradients(case, model, x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        (y.float().square().sum() / 2).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert parameter.grad.dtype == torch.float32
                gradient, exact = parameter.grad, expected[name]
                if case.name.startswith("embedding-") and "lora_A" in name:
                    exact[:, 1] = 0
                assert_near(gradient, exact, torch.bfloat16, factor=6)


# Grouped convolutions ------------------------------------------------------------------------------------------------


def grouped() -> Holder:
    torch.manual_seed(4)
    return Holder(nn.Conv2d(8, 12, 3, padding=1, groups=4)).eval()


def test_a_grouped_convolution_trains_saves_and_refuses_to_fold(tmp_path: Path) -> None:
    model = grouped()
    base = snapshot(model)
    inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]), "default")
    randomize(model)
    a, b = model.layer.lora_A["default"].weight, model.layer.lora_B["default"].weight
    assert a.shape == (4, 8, 3, 3)
    assert b.shape == (12, 1, 1, 1)  # PEFT's form
    x = torch.randn(2, 8, 6, 6)
    y = model(x)
    h = F.conv2d(x.double(), a.double(), padding=1)
    expected = F.conv2d(x.double(), base["layer.weight"].double(), base["layer.bias"].double(), padding=1, groups=4)
    expected = expected + 1.5 * F.conv2d(h, b.double(), groups=4)
    assert_near(y, expected, torch.float32, 8)
    for found, exact in zip(
        torch.autograd.grad(y.square().sum(), [a, b]),
        torch.autograd.grad(expected.square().sum(), [a, b]),
        strict=True,
    ):
        assert_near(found, exact, torch.float32, 16)

    with pytest.raises(MergeError, match="layer: the update of a grouped convolution crosses its groups"):
        merge(model)
    assert torch.equal(model(x), y)
    assert torch.equal(model.layer.weight, base["layer.weight"])
    save_adapter(model, tmp_path, "default")
    other = grouped()
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), y)


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    model = grouped()
    with pytest.raises(TargetError, match="layer: its rank 6 must be divisible by the convolution's 4 groups"):
        inject(model, LoraConfig(r=6, target_modules=["layer"]), "default")
    assert type(model.layer) is nn.Conv2d


# Dropout -------------------------------------------------------------------------------------------------------------


def masked_copy(x: Tensor, p: float) -> Tensor:
    return dropped(x, dropped_indices(draw_mask(x, p), x, p))


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    case = BY_NAME["linear"]
    model = adapted(case, ADDITIVE, torch.float32, 1, lora_dropout=0.25)
    twin = adapted(case, ADDITIVE, torch.float32, 1)
    x = case.input()
    assert torch.equal(model(x), twin(x))
    model.train()
    a, b = model.layer.lora_A["one"].weight.detach(), model.layer.lora_B["one"].weight.detach()
    torch.manual_seed(9)
    y = model(x)
    torch.manual_seed(9)
    masked = masked_copy(x, 0.25)
    assert 0.1 < (masked == 0).float().mean() < 0.4
    expected = case.layer().double()(x.double()) + 1.5 / 0.75 * masked.double() @ a.double().t() @ b.double().t()
    assert_near(y, expected, torch.float32, 6)
    torch.manual_seed(10)
    assert not torch.equal(model(x), y)
    mean = torch.stack([model(x).detach() for _ in range(400)]).mean(0)
    assert_mean_near(mean, twin(x), 0.1)


def test_the_gradients_are_those_of_the_mask_that_the_forward_drew() -> None:
    """Against float64 autograd of the formula with the mask written out: it is drawn again, not kept."""
    case = BY_NAME["linear"]
    model, x = adapted(case, ADDITIVE, torch.float32, 1, lora_dropout=0.25).train(), case.input().requires_grad_(True)
    a, b = model.layer.lora_A["one"].weight, model.layer.lora_B["one"].weight
    torch.manual_seed(9)
    model(x).square().sum().backward()
    torch.manual_seed(9)
    mask = masked_copy(torch.ones_like(x), 0.25).double()
    x2, a2, b2 = (t.detach().double().requires_grad_(True) for t in (x, a, b))
    y = case.layer().double()(x2) + 1.5 / 0.75 * (x2 * mask) @ a2.t() @ b2.t()
    y.square().sum().backward()
    for found, exact in ((x, x2), (a, a2), (b, b2)):
        assert found.grad is not None
        assert exact.grad is not None
        assert_near(found.grad, exact.grad, torch.float32, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_dropout_drops_with_its_probability_independently(p: float, dtype: torch.dtype) -> None:
    x = (torch.rand(401, 503) + 0.5).to(dtype)
    torch.manual_seed(3)
    mask = draw_mask(x, p)
    y = dropped(x, dropped_indices(mask, x, p))
    kept = y != 0
    assert y.dtype == dtype
    assert torch.equal(y[kept], x[kept])
    n = x.numel()
    assert abs(int((~kept).sum()) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    for dim, size in ((0, 401), (1, 503)):  # no row and no column is left out or dropped whole
        assert ((~kept).double().mean(dim) - p).abs().max() < 6 * (p * (1 - p) / size) ** 0.5 + 3 / size
    neighbors = int((~kept[:, 1:] & ~kept[:, :-1]).sum())
    assert abs(neighbors - n * p * p) < 8 * (n * p * p) ** 0.5 + 503
    assert torch.equal(dropped(x, dropped_indices(mask, x, p)), y)
    again = masked_copy(x, p)
    together = int(((again == 0) & ~kept).sum())  # two draws are independent
    assert abs(together - n * p * p) < 6 * (n * p * p) ** 0.5


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.05, 0.4])
def test_dropout_does_not_depend_on_the_default_dtype(p: float, default: torch.dtype) -> None:
    x = torch.ones(100_000)
    torch.manual_seed(0)
    expected = draw_mask(x, p)
    torch.manual_seed(0)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(draw_mask(x, p), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("p", [1e-6, 1e-8, 1e-9, 1e-12])
def test_places_of_a_rare_dropout_are_in_the_tensor(p: float) -> None:
    x = torch.ones(1000)
    for _ in range(50):
        places = dropped_indices(draw_mask(x, p), x, p)
        assert places.numel() == 0 or 0 <= int(places.min()) <= int(places.max()) < 1000


def assert_mean_near(found: Tensor, expected: Tensor, share: float) -> None:
    assert (found - expected).norm() <= share * expected.norm()


def test_an_embedding_takes_no_dropout() -> None:
    case = BY_NAME["embedding"]
    model = adapted(case, ADDITIVE, torch.float32, 1, lora_dropout=0.5)
    assert torch.equal(model.train()(case.input()), model.eval()(case.input()))
