"""Decide which layers a configuration adapts, which modules it trains whole, and why the rest is left out.

Everything is decided, and every fault found, before the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ALL_LINEAR, ATTENTION, PRESETS, LoraConfig
from ..errors import Faults, TargetError, nearest
from ..layers.base import Shape, Storage
from ..layers.extend import refuse_instance_forward
from ..layers.replacement import BIAS_CLASSES
from ..layers.shapes import ConvShape, runs_forward_of, shape_of
from ..layers.storage import storage_of, why_no_storage
from .bypass import bypassed_modules
from .embeddings import output_embeddings
from .heads import find_heads, outside_backbone
from .match import PatternTable, layer_index, matches
from .walk import original_modules

ONLY_WHOLE = "matches only modules that are trained whole; modules_to_save=[] adapts them instead"
ONLY_OUTSIDE = "matches only modules outside layers_to_transform"
ONLY_CONTAINERS = "matches only containers of layers, none of which has a weight of its own"
NEXT_STEP = "print(explain_targets(model, config)) with target_modules='all-linear' lists what can be adapted."


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name, shape class, storage, rank R, alpha and scaling."""

    name: str
    module: nn.Module
    shape: Shape
    storage: Storage
    r: int
    alpha: float
    scaling: float

    @property
    def parameters(self) -> int:
        a, b = self.shape.shapes(self.module, self.r)
        return _product(a) + _product(b)


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
    plan = Explanation()
    modules = dict(original_modules(model))
    plan.saved = _saved_modules(model, modules, config, faults, from_file)
    chosen = _chosen(model, modules, config, plan, faults, allow_bypassed or from_file, from_file)
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    for name, (module, shape, storage) in chosen.items():
        r, alpha = ranks.get(name, config.r), alphas.get(name, config.alpha)
        if isinstance(shape, ConvShape) and r % module.groups:
            faults.add(f"{name}: its rank {r} must be divisible by the convolution's {module.groups} groups")
        plan.layers.append(Target(name, module, shape, storage, r, alpha, config.scaling(r, alpha)))
    if not from_file:
        for field_name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            for key in table.unused():
                faults.add(f"{field_name}[{key!r}] matches no adapted layer{nearest(key, _last_names(chosen))}")
    plan.biases = _bias_modules(modules, config, chosen, plan, from_file)
    faults.check(TargetError, NEXT_STEP)
    plan.notes = _notes(modules, plan)
    return plan


def _saved_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, faults: Faults, from_file: bool
) -> dict[str, str]:
    if config.modules_to_save is None:
        return {} if from_file else find_heads(model)
    saved: dict[str, str] = {}
    unmatched = set(config.modules_to_save)
    for name in modules:
        hit = matches(set(config.modules_to_save), name)
        if hit and not any(name.startswith(s + ".") for s in saved):
            saved[name] = "named in modules_to_save"
        unmatched.difference_update(hit)
    if not from_file:
        for pattern in sorted(unmatched):
            faults.add(f"modules_to_save: {pattern!r} matches no module{nearest(pattern, _all_names(modules))}")
    return saved


Chosen = dict[str, tuple[nn.Module, Shape, Storage]]


def _chosen(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    plan: Explanation,
    faults: Faults,
    allow_bypassed: bool,
    from_file: bool,
) -> Chosen:
    preset = config.target_modules in PRESETS
    wanted = _preset(model, config) if preset else _named(config)
    chosen: Chosen = {}
    hits: dict[str, int] = {} if isinstance(config.target_modules, str) else dict.fromkeys(config.target_modules, 0)
    excluded: set[str] = set()
    indices = (
        [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    )
    seen_indices: set[int] = set()
    bypassed = bypassed_modules(model)
    elsewhere: dict[str, str] = {}  # pattern -> what is wrong with the modules that it did match
    for name, module in modules.items():
        patterns = wanted(name, module) if name else []
        if not patterns:
            continue
        if config.exclude_modules:
            hit = matches(config.exclude_modules, name)
            excluded.update(hit)
            if hit:
                plan.skipped[name] = "excluded by exclude_modules"
                for p in patterns:
                    hits[p] = hits.get(p, 0) + 1
                continue
        saved_in = next((s for s in plan.saved if name == s or name.startswith(s + ".")), None)
        if saved_in is not None:
            plan.skipped[name] = f"trained whole with {saved_in}"
            elsewhere |= dict.fromkeys(patterns, ONLY_WHOLE)
            continue
        if indices is not None:
            index = layer_index(name, config.layers_pattern)
            if index is None or index not in indices:
                plan.skipped[name] = "its layer is not in layers_to_transform"
                elsewhere |= dict.fromkeys(patterns, ONLY_OUTSIDE)
                continue
            seen_indices.add(index)
        reason = _why_not(module)
        if reason == "" and not preset:
            elsewhere = dict.fromkeys(patterns, ONLY_CONTAINERS) | elsewhere
            continue  # a container or a module without parameters: not what the pattern is about
        for p in patterns:
            hits[p] = hits.get(p, 0) + 1
        if reason is None and name in bypassed and not allow_bypassed and not preset:
            faults.add(f"{name}: {bypassed[name]} (allow_bypassed=True adapts it all the same)")
        elif reason is None and name in bypassed and preset and not from_file:
            plan.skipped[name] = bypassed[name]
        elif reason is not None:
            if preset:
                plan.skipped[name] = reason or "has no weight of its own"
            else:
                faults.add(f"{name}: {reason}")
        else:
            shape, storage = shape_of(module), storage_of(module)
            assert shape is not None
            assert storage is not None
            chosen[name] = (module, shape, storage)
    _unmatched(config, modules, hits, excluded, seen_indices, elsewhere, indices, faults, from_file)
    if not chosen and not faults.found:
        faults.add(f"target_modules={config.target_modules!r} leaves no layer to adapt")
    return chosen


def _unmatched(
    config: LoraConfig,
    modules: dict[str, nn.Module],
    hits: dict[str, int],
    excluded: set[str],
    seen_indices: set[int],
    elsewhere: dict[str, str],
    indices: list[int] | None,
    faults: Faults,
    from_file: bool,
) -> None:
    patterns = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    for pattern in patterns:
        if hits.get(pattern):
            continue
        if pattern in elsewhere:
            said = elsewhere[pattern] == ONLY_OUTSIDE and not seen_indices  # each of the layers is a fault already
            if not from_file and not said:
                faults.add(f"target_modules: {pattern!r} {elsewhere[pattern]}")
        elif pattern in PRESETS and isinstance(config.target_modules, str):
            faults.add(
                f"target_modules={pattern!r} finds no layer outside the head; name the layers, such as convolutions"
            )
        elif not from_file or isinstance(config.target_modules, str):
            faults.add(f"target_modules: {pattern!r} matches nothing{nearest(pattern, _all_names(modules))}")
    if from_file:
        return
    if config.exclude_modules:
        exclude = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        for pattern in exclude:
            if pattern not in excluded:
                faults.add(
                    f"exclude_modules: {pattern!r} excludes none of the targets{nearest(pattern, _all_names(modules))}"
                )
    for index in indices or []:
        if index not in seen_indices:
            faults.add(f"layers_to_transform: no target lies in layer {index}")


def _named(config: LoraConfig) -> Callable[[str, nn.Module], list[str]]:
    targets = config.target_modules if isinstance(config.target_modules, str) else frozenset(config.target_modules)
    return lambda name, module: matches(targets, name)


def _preset(model: nn.Module, config: LoraConfig) -> Callable[[str, nn.Module], list[str]]:
    """Which modules a preset is about. What it leaves out of them by name is decided by the caller, and listed."""
    outputs = {id(m) for m in output_embeddings(model)}
    heads = tuple(f"{n}." for n in outside_backbone(model))
    blocks: set[str] = set()
    preset = config.target_modules
    assert isinstance(preset, str)

    def all_linear(name: str, module: nn.Module) -> list[str]:
        linear = isinstance(module, (nn.Linear, Conv1D))
        return [ALL_LINEAR] if linear and id(module) not in outputs and not f"{name}.".startswith(heads) else []

    def attention(name: str, module: nn.Module) -> list[str]:
        if _is_attention(name, module):
            blocks.add(name)
        parents = (name[:i] for i, c in enumerate(name) if c == ".")
        return [ATTENTION] if all_linear(name, module) and any(p in blocks for p in parents) else []

    return all_linear if preset == ALL_LINEAR else attention


def _is_attention(name: str, module: nn.Module) -> bool:
    words = (type(module).__name__ + " " + name.rpartition(".")[2]).lower()
    return bool(name) and ("attention" in words or "attn" in words)


def _why_not(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted; None where it can; an empty string where it is no layer at all."""
    if not module._parameters and not hasattr(module, "parametrizations"):
        return ""
    if "weight" not in module._parameters and module._modules and not hasattr(module, "parametrizations"):
        return ""
    shape = shape_of(module)
    if shape is None:
        if hasattr(module, "parametrizations"):
            return why_no_storage(module)
        return f"{type(module).__name__} is not a kind of layer whose forward is known"
    if storage_of(module) is None:
        return why_no_storage(module)
    return shape.refuse(module) or refuse_instance_forward(module)


def _bias_modules(
    modules: dict[str, nn.Module], config: LoraConfig, chosen: Chosen, plan: Explanation, from_file: bool
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
        shared = [n for n in users[id(target.module._parameters["weight"])] if n != target.name]
        if shared:
            notes.append(
                f"{target.name} shares its weight with {', '.join(shared)}: it trains, saves and loads; merging it "
                "needs untie=True"
            )
    return notes


def _all_names(modules: dict[str, nn.Module]) -> list[str]:
    return [*_last_names(modules), *modules]


def _last_names(modules: Any) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in modules))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
