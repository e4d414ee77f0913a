"""The scores of labels over a frozen head against float64 maths, and what the computation holds in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lora.data.spans import IGNORED
from hf_lora.loss import frozen_head as loss_module
from hf_lora.loss.frozen_head import label_scores

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
V, H = 50, 16
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda mask: mask | True,
    "half": lambda mask: mask,
    "one": lambda mask: mask & (mask.flatten().cumsum(0).view(mask.shape) == 1),
    "none": lambda mask: mask & False,
}


def problem(kept: str = "half", bias: bool = False, tokens: int = 12, dtype: torch.dtype = torch.float64) -> Any:
    """Hidden states (2, T, H), a head (V, H), its bias, and labels (2, T)."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, tokens, H), (V, H)))
    shift = torch.randn(V, generator=generator).to(dtype) if bias else None
    labels = torch.randint(V, (2, tokens), generator=generator)
    mask = torch.rand(2, tokens, generator=generator) < 0.5
    mask[0, 0] = True
    hidden, weight = hidden.to(dtype).requires_grad_(), (weight * 0.5).to(dtype)
    return hidden, weight, shift, labels.where(KEPT[kept](mask), IGNORED)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """PyTorch's loss from all logits: log p (2, T), zero where ignored."""
    logits = F.linear(hidden, weight, bias)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED).view_as(
        labels
    )


def value_and_gradient(
    method: Callable[..., Any], hidden: Tensor, *rest: Any, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of their sum under weights that differ from token to token."""
    log_probs = method(hidden, *rest)
    log_probs = getattr(log_probs, "log_probs", log_probs)
    weights = torch.linspace(-1, 2, log_probs.numel(), dtype=log_probs.dtype).view_as(log_probs)
    (gradient,) = torch.autograd.grad((log_probs * weights).sum() * scale, hidden)
    return log_probs.detach(), gradient


@pytest.fixture(params=[None, 3 * V], ids=["one chunk", "chunks of 3"])
def chunked(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param:
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", request.param)
    return request.param


# The scores of labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_value_and_gradient_are_those_of_the_cross_entropy(kept: str, bias: bool, chunked: Any) -> None:
    case = problem(kept, bias)
    own, theirs = value_and_gradient(label_scores, *case), value_and_gradient(plain, *case)
    assert torch.equal(own[0] == 0, case[3] == IGNORED)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-13)


def test_autocast_leaves_float64_alone() -> None:
    case = problem("half")
    expected = value_and_gradient(label_scores, *case)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(label_scores, *case)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_one_token_and_a_chunk_smaller_than_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", V // 2)
    hidden, weight, bias, labels = problem("all", tokens=1)
    own = value_and_gradient(label_scores, hidden, weight, bias, labels)
    torch.testing.assert_close(own, value_and_gradient(plain, hidden, weight, bias, labels), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_loses_no_more_to_rounding_than_the_plain_loss(dtype: torch.dtype, bias: bool) -> None:
    hidden, weight, shift, labels = problem("half", bias, tokens=64, dtype=dtype)
    exact = hidden.detach().double().requires_grad_()
    wide = None if shift is None else shift.double()
    expected = value_and_gradient(plain, exact, weight.double(), wide, labels)
    found = value_and_gradient(label_scores, hidden, weight, shift, labels)
    theirs = value_and_gradient(plain, hidden, weight, shift, labels)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    for ours, other, right in zip(found, theirs, expected, strict=True):
        assert relative_error(ours, right) <= 1.5 * relative_error(other, right) + EPS[dtype] / 4


def test_autocast_sets_the_dtype_of_the_products() -> None:
    hidden, weight, bias, labels = problem("half", True, tokens=64, dtype=torch.float32)
    exact = value_and_gradient(plain, hidden, weight, bias, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(label_scores, hidden, weight, bias, labels)
        theirs = value_and_gradient(plain, hidden, weight, bias, labels)
    assert found[0].dtype == found[1].dtype == torch.float32
    for ours, other, right in zip(found, theirs, exact, strict=True):
        assert EPS[torch.bfloat16] / 8 < relative_error(ours, right) <= 1.5 * relative_error(other, right)


def test_a_scaled_loss_in_float16_has_finite_and_right_gradients() -> None:
    hidden, weight, _, labels = problem("half", tokens=64, dtype=torch.float16)
    weight = weight / 64  # of the size that heads have
    exact = hidden.detach().double().requires_grad_()
    for scale in (65536.0, 65536.0 / 64):
        _, gradient = value_and_gradient(label_scores, hidden, weight, None, labels, scale=scale)
        _, expected = value_and_gradient(plain, exact, weight.double(), None, labels, scale=scale)
        assert gradient.isfinite().all()
        assert_near(gradient, expected, torch.float16)
    # Of many tokens: each row's gradient is below float16's smallest number until the scale is on it.
    _, gradient = value_and_gradient(label_scores, hidden, weight, None, labels, scale=65536 * 2.0**-24)
    _, expected = value_and_gradient(plain, exact, weight.double(), None, labels, scale=65536 * 2.0**-24)
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * EPS[torch.float16], atol=2.0**-24)
    assert gradient.count_nonzero() > gradient.numel() / 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_predictions_hits_and_entropy(dtype: torch.dtype, chunked: Any) -> None:
    hidden, weight, bias, labels = problem("half", True, tokens=300, dtype=dtype)
    with torch.no_grad():
        logits = F.linear(hidden, weight, bias)
        labels[0] = logits[0].argmax(-1).where(labels[0] != IGNORED, IGNORED)
        last = V - 1 - logits[1].flip(-1).argmax(-1)  # of the likeliest: another than argmax's where there are ties
        labels[1] = last.where(labels[1] != IGNORED, IGNORED)
        assert torch.equal(last, logits[1].argmax(-1)) == (dtype == torch.float64)
    scores = label_scores(hidden, weight, bias, labels, predictions=True, entropy=True)
    assert scores.predictions is not None
    assert scores.entropy is not None
    mask = labels != IGNORED
    assert torch.equal(scores.mask, mask)
    # bfloat16 has ties: the first of the likeliest is the prediction, here as in argmax.
    assert torch.equal(scores.predictions[mask], logits.argmax(-1)[mask])
    assert torch.equal(scores.hits, (logits.argmax(-1) == labels) & mask)
    assert scores.hits[0][mask[0]].all()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.distributions.Categorical(logits=logits.to(exact)).entropy()
    torch.testing.assert_close(scores.entropy, expected.where(mask, 0), rtol=16 * EPS[exact], atol=16 * EPS[exact])
    assert scores.log_probs.requires_grad
    assert not scores.entropy.requires_grad
    without = label_scores(hidden, weight, bias, labels)
    assert without.predictions is None
    assert without.entropy is None
    assert torch.equal(without.log_probs, scores.log_probs)
    value, gradient = value_and_gradient(lambda h: label_scores(h, weight, bias, labels, entropy=True), hidden)
    torch.testing.assert_close((value, gradient), value_and_gradient(label_scores, hidden, weight, bias, labels))


# What is held --------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The size of what each operation makes, in elements, and how many products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0
        self.saved: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:  # else a view
                self.largest = max(self.largest, made.numel())
        self.products += str(func) in ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        self.saved.append(tensor)
        return tensor


def watched(method: Callable[..., Any], vocabulary: int, tokens: int, labeled: int) -> tuple[Watch, Tensor]:
    hidden = torch.randn(1, tokens, H, requires_grad=True)
    weight = torch.randn(vocabulary, H)
    labels = torch.full((1, tokens), IGNORED)
    labels[0, :labeled] = torch.randint(vocabulary, (labeled,))
    watch = Watch()
    with watch, torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda t: t):
        value_and_gradient(method, hidden, weight, None, labels)
    watch.saved = [t for t in watch.saved if t.data_ptr() != weight.data_ptr()]
    return watch, weight


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * 1000)
    for tokens in (100, 200):
        assert watched(label_scores, 1000, tokens, tokens)[0].largest == 8 * 1000
        assert watched(plain, 1000, tokens, tokens)[0].largest >= tokens * 1000
    # A larger vocabulary makes the chunks shorter; a token without a label meets no head at all.
    assert watched(label_scores, 2000, 200, 200)[0].largest == 8 * 1000
    assert watched(label_scores, 1000, 200, 4)[0].largest == max(4 * 1000, 200 * H)
    assert watched(label_scores, 1000, 200, 4)[0].products == 2
    assert watched(label_scores, 1000, 200, 0)[0].products == 0


def test_the_backward_keeps_labeled_tokens_times_hidden() -> None:
    for vocabulary in (1000, 2000):
        for labeled in (10, 40):
            watch, _ = watched(label_scores, vocabulary, 100, labeled)
            floats = [t.numel() for t in watch.saved if t.is_floating_point() and t.shape != (1, 100)]
            assert floats[0] == labeled * H
            assert sum(floats[1:]) <= labeled
            rest = sum(t.nbytes for t in watch.saved if not t.is_floating_point())
            assert rest <= 3 * 8 * labeled  # where the labels stand
            theirs = sum(t.numel() for t in watched(plain, vocabulary, 100, labeled)[0].saved)
            assert theirs >= 100 * vocabulary


@pytest.mark.parametrize("lead", [1.0, 8.0, 16.0, 17.0, 30.0])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_token_that_is_nearly_certain_has_a_gradient(lead: float, bias: bool) -> None:
    """In float32, p - 1 is 0 from a lead of 16.6 nats on. Reference: PyTorch's loss in float64."""
    tokens, size = 12, 10  # fewer tokens in the vocabulary than dimensions, so any logits are possible
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(size, H, generator=generator)
    shift = torch.randn(size, generator=generator) if bias else None
    labels = torch.randint(size, (1, tokens), generator=generator)
    logits = torch.rand(1, tokens, size, generator=generator).scatter_(-1, labels[..., None], 1 + lead)
    hidden = (logits - (0 if shift is None else shift)) @ torch.linalg.pinv(weight).mT
    found, expected = (
        value_and_gradient(
            method,
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype),
            None if shift is None else shift.to(dtype),
            labels,
        )
        for method, dtype in ((label_scores, torch.float32), (plain, torch.float64))
    )
    # A logit is a sum of H rounded products, and the error of two logits is a factor of every probability.
    slack = 2 * H * EPS[torch.float32] * float((hidden.abs() @ weight.abs().mT).max())
    assert relative_error(found[0], expected[0]) < slack
    assert relative_error(found[1], expected[1]) < slack


def test_without_gradients_none_is_made() -> None:
    hidden, weight, bias, labels = problem("all")
    with torch.no_grad(), Watch() as watch:
        assert not label_scores(hidden, weight, bias, labels).log_probs.requires_grad
    assert watch.products == 1
    with Watch() as watch:
        assert not label_scores(hidden.detach(), weight, bias, labels).log_probs.requires_grad
    assert watch.products == 1
    with torch.inference_mode():
        found = label_scores(hidden, weight, bias, labels).log_probs
    torch.testing.assert_close(found, plain(hidden, weight, bias, labels).detach())
