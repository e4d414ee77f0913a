"""What a plain model does by itself: the reference of the sweep. Its errors are nobody's fault here."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import relative_error
from models import Case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction
from transformers.pytorch_utils import Conv1D

EPS = torch.finfo(torch.float32).eps
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)


@dataclass
class Base:
    """What the plain model does by itself: the reference of everything else."""

    outputs: list[Tensor]
    called: set[str]
    gradient: dict[str, bool]
    """Layer -> whether its weight has a gradient other than zero."""
    tokens: Tensor | str | None
    copies: str | None
    pickles: str | None
    checkpointing: dict[bool, str | None]
    """use_reentrant -> why it does not work."""


@functools.lru_cache(maxsize=2)
def base_of(case: Case) -> Base:
    model = case.build().requires_grad_(False)
    batch = case.inputs(model)
    results = outputs(model, batch)
    assert results, "the model gave no tensor"
    assert all(torch.isfinite(r).all() for r in results), "the plain model's output is not finite"
    tokens: Any = None
    if case.prompt:
        tokens = attempt(lambda: generate(case, model, batch))
    called: set[str] = set()
    model = case.build().train()
    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    loss(model, batch).backward()
    gradient = {
        name: module.weight.grad is not None and bool(module.weight.grad.any())
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and not hasattr(module, "parametrizations")
    }
    checkpointing = {kind: why(lambda kind=kind: _base_checkpointing(case, batch, kind)) for kind in (False, True)}
    used = case.build().train()  # running a model can leave in it what no pickle takes
    if used.supports_gradient_checkpointing:
        used.gradient_checkpointing_enable({"use_reentrant": False})
    attempt(lambda: loss(used, batch).backward())
    outputs(used.eval(), batch)
    if "_require_grads_hooks" in vars(used):
        used.disable_input_require_grads()
    copies, pickles = why(lambda: copy.deepcopy(used)), why(lambda: pickle.loads(pickle.dumps(used)))
    return Base(results, called, gradient, tokens, copies, pickles, checkpointing)


def _base_checkpointing(case: Case, batch: dict[str, Any], reentrant: bool) -> None:
    model = case.build().train()
    loss(model, batch).backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model = case.build().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with bounded():
        loss(model, batch).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if plain.keys() != found.keys():
        raise RuntimeError(f"{len(plain.keys() - found.keys())} of {len(plain)} parameters get no gradient")
    different = [n for n, g in plain.items() if relative_error(found[n], g) > 1e4 * EPS and float(g.norm()) > 1e-7]
    if different:
        raise RuntimeError(f"{len(different)} of {len(plain)} gradients differ")


@contextmanager
def bounded(calls: int = 100) -> Iterator[None]:
    """An error where reentrant checkpoints go on without end, as they do where a layer returns an input as it was."""
    original, count = CheckpointFunction.backward, iter(range(calls))

    def backward(ctx: Any, *grads: Any) -> Any:
        if next(count, None) is None:
            raise RuntimeError("the backward of reentrant checkpoints calls itself without end")
        return original(ctx, *grads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFunction, "backward", staticmethod(backward))
        yield


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or the error as a text: of the plain base alone, whose errors are nobody's fault here."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def why(call: Callable[[], Any]) -> str | None:
    """Why the plain base cannot do something; None where it can."""
    result = attempt(call)
    return result if isinstance(result, str) else None


def outputs(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor in the model's output."""
    torch.manual_seed(0)  # some losses sample points
    with torch.no_grad():
        return list(_floats(model(**batch)))


def _floats(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else [output]
    for value in values:
        for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                yield leaf


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's own loss, or the mean square of its outputs."""
    torch.manual_seed(0)
    output = model(**batch)
    own = output.get("loss") if isinstance(output, Mapping) else None
    return own if own is not None else torch.stack([(o**2).mean() for o in _floats(output)]).mean()


def generate(case: Case, model: Any, batch: dict[str, Any]) -> Tensor:
    prompt = {key: batch[key].clone() for key in case.prompt}  # some write into what they are given
    torch.manual_seed(0)
    tokens: Tensor = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return tokens


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative error over all outputs together."""
    return relative_error(torch.cat([f.flatten() for f in found]), torch.cat([w.flatten() for w in wanted]))
