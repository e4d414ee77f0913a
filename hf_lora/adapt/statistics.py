"""Statistics of batches for initializations: run the model on them while collectors observe it.

In: a model, the sites that will be adapted, batches. Out: the statistics of each site. The model does not change: no
training, no gradients are kept, and the random state is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import ConfigError
from ..layers.inits import Init, InitCall, Run
from ..layers.ops import evaluation_mode, kept_random_states
from ..layers.storages import execution_device
from .activation import switch
from .state import state_of
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
    targets, changed, alphas = [], {}, {}
    for target in plan.layers:
        if ranks[target.name] < 1:
            plan.skipped[target.name] = "the initialization chose rank 0"
            continue
        adapter = target.adapter
        if ranks[target.name] != adapter.r:
            changed[target.name] = r = ranks[target.name]
            alpha = init.alpha(adapter.alpha, adapter.r, r)
            if alpha != adapter.alpha:
                alphas[target.name] = alpha
            adapter = replace(adapter, r=r, alpha=alpha, scaling=config.scaling(r, alpha))
            adapter.specs = adapter.declare(target.site, target.shape)
        reader = None if original is None else partial(original, target.name)
        targets.append(replace(target, adapter=adapter, statistics=found.get(target.name), original=reader))
    plan.layers[:] = targets
    # The name of a layer comes before patterns, and its value replaces one that the configuration has for that name.
    return replace(
        config,
        rank_pattern=changed | config.rank_pattern | changed,
        alpha_pattern=alphas | config.alpha_pattern | alphas,
    )


def collect(
    model: nn.Module, targets: Iterable[Target], init: Init, batches: Iterable[object] | None, call: str
) -> dict[str, Any]:
    """Name of a target -> its statistics on the base, without adapters; empty if `init` needs none.

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
            f"{call}: the initialization {type(init).__name__} needs {init.needs}. Call apply_lora(model, config, "
            "name, batches=[…]) with a few batches of the training data, or pass the configuration to LoraTrainer, "
            "which takes them from its data."
        )
    calls = {target.name: _call(target) for target in targets}
    weights = {name: found.layer.weight for name, found in calls.items()}
    differentiable = init.needs == "gradients"
    required = [(weight, weight.requires_grad) for weight in {id(w): w for w in weights.values()}.values()]
    with (
        evaluation_mode(model),
        kept_random_states(),
        _without_adapters(model),
        ExitStack() as undo,
    ):  # every step is undone, even after an error
        for weight, flag in required:
            undo.callback(weight.requires_grad_, flag)
            weight.requires_grad_(differentiable)
        for hooks in (d for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks)):
            undo.callback(_put_back, hooks, hooks.copy())
        run = partial(_run, model, weights if differentiable else {})
        return init.observe(Run(calls, chain([first], batches), run, type(init).__name__))


def _call(target: Target) -> InitCall:
    site = target.site
    device = execution_device(site)
    return InitCall(
        site, target.shape, target.storage, target.specs, device, target.scaling, target.options, None, target.original
    )


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Within, no adapter acts: the new one is to be the only one."""
    state = state_of(model)
    if state is None or not state.activity.enabled:
        yield
        return
    switch(model, state, enabled=False)
    try:
        yield
    finally:
        switch(model, state, enabled=True)


def _put_back(hooks: dict[int, Callable[..., Any]], before: dict[int, Callable[..., Any]]) -> None:
    hooks.clear()
    hooks.update(before)


def _run(
    model: nn.Module, weights: Mapping[str, Tensor], batch: object, names: Sequence[str]
) -> Sequence[Tensor | None]:
    """Run the model on a batch. Returns the gradients of the weights `names`, if there are `weights`."""
    wanted = [weights[name] for name in names if name in weights]
    with torch.set_grad_enabled(bool(wanted)):
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
        if not wanted:
            return []
        loss = getattr(output, "loss", output)
        if loss is None:
            raise ConfigError("The batches have no labels, so the model returns no loss. Add labels to the batches.")
        return torch.autograd.grad(loss, wanted, allow_unused=True)
