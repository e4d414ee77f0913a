"""Decide which layers a configuration adapts, which modules it trains whole, and why the rest is left out.

Everything is decided, and every fault found, before the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from ..config import LoraConfig
from ..errors import ConfigError, Faults, TargetError, nearest
from ..layers.contract import FactorSpec, Method, Shape, Storage
from ..layers.inits import INITS, init_name
from ..layers.methods import METHODS
from ..layers.replacement import BIAS_CLASSES
from ..layers.shapes import runs_forward_of
from ..layers.storages import is_packed, is_unfinished
from .bypass import bypassed_modules
from .heads import find_heads
from .match import PatternTable, matches
from .select import Selection, all_names, last_names
from .walk import original_modules

NEXT_STEP = "print(explain_targets(model, config)) with target_modules='all-linear' lists what can be adapted."


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name, shape, storage, method and declared factors, rank R, alpha and scaling."""

    name: str
    module: nn.Module
    shape: Shape
    storage: Storage
    method: Method
    specs: dict[str, FactorSpec]
    r: int
    alpha: float
    scaling: float

    @property
    def parameters(self) -> int:
        return sum(prod(spec.shape) for spec in self.specs.values() if spec.trainable)


@dataclass
class Explanation:
    """What a configuration does to a model. `str()` is a table for people."""

    layers: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why it is left out."""
    saved: dict[str, str] = field(default_factory=dict)
    """Name -> why it is trained and saved whole."""
    biases: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        from .report import explanation_table

        return explanation_table(self)


def explain_targets(model: nn.Module, config: Any = None) -> Explanation:
    """Every layer that `config` would adapt, with shape, rank, alpha and parameters, and what it leaves out.

    Changes nothing.

    Raises:
        TargetError: lists every pattern that matches nothing and every named module that cannot be adapted.
    """
    return resolve(model, LoraConfig.from_any(config), call="explain_targets(model, config)", allow_bypassed=True)


def resolve(
    model: nn.Module,
    config: LoraConfig,
    call: str,
    allow_bypassed: bool = False,
    from_file: bool = False,
) -> Explanation:
    """The plan of an injection.

    Args:
        allow_bypassed: adapt named layers although their parent multiplies by their weight itself.
        from_file: the configuration was read from an adapter's file, whose tensors decide: modules to save and
            patterns that match nothing there are no fault.
    """
    faults = Faults(call)
    check_names(config.method, config.init_lora_weights, faults)
    faults.check(ConfigError, "Correct the configuration, or import the package that registers these.")
    plan, method = Explanation(), METHODS[config.method]
    modules = dict(original_modules(model))
    plan.saved = _saved_modules(model, modules, config, faults, from_file)
    selection = Selection(modules, config, plan.saved, faults, allow_bypassed=allow_bypassed, from_file=from_file)
    chosen, plan.skipped = selection.chosen, selection.skipped
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    for name, (module, shape, storage) in chosen.items():
        r, alpha = ranks.get(name, config.r), alphas.get(name, config.alpha)
        refused = shape.refuse_rank(module, r)
        if refused is not None:
            faults.add(f"{name}: {refused}")
            continue
        specs = method.factors(module, shape, r)
        plan.layers.append(Target(name, module, shape, storage, method, specs, r, alpha, config.scaling(r, alpha)))
    if not from_file:
        for field_name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            for key in table.unused():
                faults.add(f"{field_name}[{key!r}] matches no adapted layer{nearest(key, last_names(chosen))}")
    plan.biases = _bias_modules(modules, config, chosen, plan, from_file)
    faults.check(TargetError, NEXT_STEP)
    plan.notes = _notes(modules, plan)
    return plan


def check_names(method: str, init: bool | str, faults: Faults) -> None:
    """Add a fault for a method or an initialization that nobody has registered."""
    if method not in METHODS:
        faults.add(f"method={method!r}: {METHODS.why_unknown(method)}")
    if (name := init_name(init)) not in INITS:
        faults.add(f"init_lora_weights={name!r} is not supported: {INITS.why_unknown(name)}")


def scalings(config: LoraConfig) -> Callable[[str], float]:
    """Original name of an adapted layer -> the factor in front of B A there."""
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    return lambda name: config.scaling(ranks.get(name, config.r), alphas.get(name, config.alpha))


def _saved_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, faults: Faults, from_file: bool
) -> dict[str, str]:
    saved: dict[str, str] = {}
    if config.modules_to_save is None:
        saved = {} if from_file else find_heads(model)
        _refuse_packed(modules, saved, faults)
        return saved
    unmatched = set(config.modules_to_save)
    for name in modules:
        hit = matches(set(config.modules_to_save), name)
        if hit and not any(name.startswith(s + ".") for s in saved):
            saved[name] = "named in modules_to_save"
        unmatched.difference_update(hit)
    _refuse_packed(modules, saved, faults)
    if not from_file:
        for pattern in sorted(unmatched):
            faults.add(f"modules_to_save: {pattern!r} matches no module{nearest(pattern, all_names(modules))}")
    return saved


def _refuse_packed(modules: dict[str, nn.Module], saved: dict[str, str], faults: Faults) -> None:
    """Refuse to train a quantised module whole, and quantised layers without weights, which cannot run."""
    unfinished = {n: m for n, m in modules.items() if is_unfinished(m)}
    heads = {n: why for n, why in saved.items() if any(is_packed(p) for p in modules[n].parameters())}
    heads |= {s: why for s, why in saved.items() if any(f"{n}.".startswith(f"{s}.") for n in unfinished)}
    others = [n for n in unfinished if not any(f"{n}.".startswith(f"{head}.") for head in heads)]
    skip = f"llm_int8_skip_modules or modules_to_not_convert: {[*heads, *others]!r}"
    for name, why in heads.items():
        faults.add(
            f"{name} would be trained whole ({why}), and is quantised. Load the base with all such modules left out, "
            f"too ({skip})"
        )
    for name in others:
        faults.add(
            f"{name} has a quantised forward and a weight that never was, as where the base checkpoint lacks it. Load "
            f"the base with all such modules left out, too ({skip})"
        )


def _bias_modules(
    modules: dict[str, nn.Module], config: LoraConfig, chosen: Iterable[str], plan: Explanation, from_file: bool
) -> list[str]:
    if config.bias == "none":
        return []
    found = []
    bypassed = {} if from_file else bypassed_modules(modules[""])
    for name, module in modules.items():
        if config.bias == "lora_only" and name not in chosen:
            continue
        if module._parameters.get("bias") is None or any(name == s or name.startswith(s + ".") for s in plan.saved):
            continue
        if name in bypassed and name not in chosen:
            plan.skipped[f"{name}.bias"] = bypassed[name]
        elif name in chosen or any(runs_forward_of(module, cls) for cls in BIAS_CLASSES):
            found.append(name)
        else:
            plan.skipped[f"{name}.bias"] = f"how {type(module).__name__} adds its bias is not known"
    return found


def _notes(modules: dict[str, nn.Module], plan: Explanation) -> list[str]:
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    notes = []
    for target in plan.layers:
        shared = [n for n in users.get(id(target.module._parameters.get("weight")), ()) if n != target.name]
        if shared:
            notes.append(
                f"{target.name} shares its weight with {', '.join(shared)}: it trains, saves and loads; merging it "
                "needs untie=True"
            )
    return notes
