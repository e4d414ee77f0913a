"""Statistics of batches for initializations: run the model on them while collectors observe it.

In: a model, the sites that will be adapted, batches. Out: the statistics of each site. The model does not change: no
training, no gradients are kept, and the random state is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import ConfigError
from ..layers.inits import Init
from ..layers.ops import evaluation_mode, kept_random_states
from .targets import Explanation, Target


def informed(
    model: nn.Module,
    plan: Explanation,
    config: LoraConfig,
    batches: Iterable[object] | None,
    original: Callable[[str], Tensor] | None,
    call: str,
) -> LoraConfig:
    """Add what the initialization needs to the targets of a plan, and set the ranks that it chooses.

    Returns:
        The configuration, with the chosen ranks in `rank_pattern`.

    Raises:
        ConfigError: an argument that the initialization needs is missing.
    """
    if not plan.layers:
        return config
    init = plan.layers[0].adapter.init
    if init.needs == "original" and original is None:
        raise ConfigError(
            f"{call}: the initialization {config.init_lora_weights!r} needs the weights of the checkpoint. "
            "Pass original=…, a function from a layer's name to its weight in the checkpoint."
        )
    if init.needs == "nothing":
        return config
    found = collect(model, plan.layers, init, batches, call)
    wanted = {target.name: target.r for target in plan.layers}
    ranks = init.ranks(found, wanted, plan.layers[0].options) if found else wanted
    targets, changed = [], {}
    for target in plan.layers:
        if ranks[target.name] < 1:
            plan.skipped[target.name] = "the initialization chose rank 0"
            continue
        adapter = target.adapter
        if ranks[target.name] != adapter.r:
            changed[target.name] = r = ranks[target.name]
            adapter = replace(adapter, r=r, scaling=config.scaling(r, adapter.alpha))
            adapter.specs = adapter.declare(target.site, target.shape)
        reader = None if original is None else partial(original, target.name)
        targets.append(replace(target, adapter=adapter, statistics=found.get(target.name), original=reader))
    plan.layers[:] = targets
    # The name of a layer comes before patterns, and its value replaces one that the configuration has for that name.
    return replace(config, rank_pattern=changed | config.rank_pattern | changed) if changed else config


def collect(
    model: nn.Module, targets: Iterable[Target], init: Init, batches: Iterable[object] | None, call: str
) -> dict[str, Any]:
    """Name of a target -> its statistics; empty if `init` needs none.

    Args:
        batches: mappings of arguments of the forward, or single arguments. For gradients, the output must be the loss
            or have it as `.loss`.

    Raises:
        ConfigError: batches are needed but there are none.
    """
    if init.needs not in ("inputs", "gradients"):
        return {}
    batches = iter(batches or ())
    first = next(batches, None)
    if first is None:
        raise ConfigError(
            f"{call}: the initialization {type(init).__name__} needs {init.needs}. Pass batches=[…], such as a few "
            "batches of the training data."
        )
    targets = list(targets)
    weights = list({id(t.site.weight): t.site.weight for t in targets}.values())
    required = [weight.requires_grad for weight in weights]
    with (
        evaluation_mode(model),
        kept_random_states(),
        ExitStack() as undo,
    ):  # every step is undone, even after an error
        for weight, flag in zip(weights, required, strict=True):
            undo.callback(weight.requires_grad_, flag)
            weight.requires_grad_(init.needs == "gradients")
        for hooks in (d for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)):
            undo.callback(_put_back, hooks, hooks.copy())
        collectors = {target.name: init.collect(target.site) for target in targets}
        for batch in (first, *batches):
            _run(model, batch, weights if init.needs == "gradients" else [])
        return {name: collector.result() for name, collector in collectors.items()}


def _put_back(hooks: dict[int, Callable[..., Any]], before: dict[int, Callable[..., Any]]) -> None:
    hooks.clear()
    hooks.update(before)


def _run(model: nn.Module, batch: object, weights: list[Tensor]) -> None:
    with torch.set_grad_enabled(bool(weights)):
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
        if weights:
            loss = getattr(output, "loss", output)
            torch.autograd.grad(loss, weights, allow_unused=True)  # runs the collectors' hooks; results are dropped
