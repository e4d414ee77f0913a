"""What an initialization wants to know of batches: run the model on them while its collectors look on.

In: a model, the sites that will be adapted, batches. Out: the statistics of each site. The model is left as it was:
nothing is trained, no gradient is kept, and the random state is restored.
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
from ..layers.ops import used_devices
from .targets import Explanation, Target


def informed(
    model: nn.Module,
    plan: Explanation,
    config: LoraConfig,
    batches: Iterable[Any] | None,
    original: Callable[[str], Tensor] | None,
    call: str,
) -> LoraConfig:
    """Give the targets of a plan what their initialization asks for, and the ranks that come from it.

    Returns:
        The configuration, with ranks other than its own in `rank_pattern`.

    Raises:
        ConfigError: something is needed that is not given.
    """
    if not plan.layers:
        return config
    init = plan.layers[0].adapter.init
    if init.needs == "original" and original is None:
        raise ConfigError(
            f"{call}: the initialization {config.init_lora_weights!r} compares with the weights of the checkpoint. "
            "Pass original=…, a function from a layer's name to its weight there."
        )
    if init.needs == "nothing":
        return config
    found = collect(model, plan.layers, init, batches, call)
    wanted = {target.name: target.r for target in plan.layers}
    ranks = init.ranks(found, wanted, plan.layers[0].options) if found else wanted
    targets, changed = [], {}
    for target in plan.layers:
        if ranks[target.name] < 1:
            plan.skipped[target.name] = "the initialization gave it no rank"
            continue
        own = target.adapter
        if ranks[target.name] != own.r:
            changed[target.name] = r = ranks[target.name]
            own = replace(own, r=r, scaling=config.scaling(r, own.alpha))
            own.specs = own.declare(target.site, target.shape)
        reader = None if original is None else partial(original, target.name)
        targets.append(replace(target, adapter=own, statistics=found.get(target.name), original=reader))
    plan.layers[:] = targets
    # A layer's own name comes first, and has the last word where the configuration names it too.
    return replace(config, rank_pattern=changed | config.rank_pattern | changed) if changed else config


def collect(
    model: nn.Module, targets: Iterable[Target], init: Init, batches: Iterable[Any] | None, call: str
) -> dict[str, Any]:
    """Name of a target -> its statistics; empty where `init` needs none.

    Args:
        batches: mappings of the forward's arguments, or single arguments. For gradients the output is the loss or has
            it as `.loss`.

    Raises:
        ConfigError: batches are needed, and there are none.
    """
    if init.needs not in ("inputs", "gradients"):
        return {}
    batches = iter(batches or ())
    first = next(batches, None)
    if first is None:
        raise ConfigError(
            f"{call}: the initialization {type(init).__name__} looks at {init.needs}. Pass batches=[…], such as a few "
            "batches of the training data."
        )
    targets = list(targets)
    weights = list({id(t.site.weight): t.site.weight for t in targets}.values())
    required = [weight.requires_grad for weight in weights]
    training = [module for module in model.modules() if module.training]
    with ExitStack() as undo:  # all of it, whatever of it fails
        for module in training:
            undo.callback(setattr, module, "training", True)
            module.training = False  # not eval(): nothing is to be told
        for weight, flag in zip(weights, required, strict=True):
            undo.callback(weight.requires_grad_, flag)
            weight.requires_grad_(init.needs == "gradients")
        for hooks in (d for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)):
            undo.callback(_put_back, hooks, hooks.copy())
        collectors = {target.name: init.collect(target.site) for target in targets}
        with torch.random.fork_rng(devices=used_devices()):
            for batch in (first, *batches):
                _run(model, batch, weights if init.needs == "gradients" else [])
        return {name: collector.result() for name, collector in collectors.items()}


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(before)


def _run(model: nn.Module, batch: Any, weights: list[Any]) -> None:
    with torch.set_grad_enabled(bool(weights)):
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
        if weights:
            loss = getattr(output, "loss", output)
            torch.autograd.grad(loss, weights, allow_unused=True)  # for what the collectors hooked: none is kept
