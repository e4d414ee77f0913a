"""Decide which layers a configuration adapts, which modules it trains whole, and why others are skipped.

All decisions are made and all faults found before the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils import logging

from ..config import LoraConfig
from ..errors import ConfigError, Faults, TargetError, nearest
from ..layers.contract import FactorSpec, Method, Shape, Storage
from ..layers.hosts import is_offloaded
from ..layers.inits import INITS, Init, find_init
from ..layers.methods import METHODS
from ..layers.parts import PARTS, Planned, TokenRows
from ..layers.site import LayerAdapter
from ..layers.storages import is_packed, is_unfinished
from ..layers.views import View
from .bypass import uncalled_embeddings
from .heads import called_parts, find_heads, why_not_called
from .match import PatternTable, holder, matcher
from .request import check_alphas, check_names, check_pair, requested_parts, settings_of
from .select import Selection, all_names, last_names
from .ties import parted_by, same_module, tied_with_embedding
from .unsaved import planned_rows, why_unsaved
from .walk import original_modules

logger = logging.get_logger(__name__)

NEXT_STEP = "print(explain_targets(model, config)) with target_modules='all-linear' lists what can be adapted."


@dataclass(eq=False)
class Target:
    """One weight to adapt, with its shape, its storage and the properties of the adapter there.

    `name` is the name of its layer; for a module with several weights, that of the weight. `path` is the module's.
    """

    name: str
    path: str
    site: Any
    shape: Shape
    storage: Storage
    adapter: LayerAdapter
    options: str = ""
    """Options in the initialization's name."""
    statistics: Any = None
    original: Callable[[], Tensor] | None = None
    from_file: bool = False
    """Whether a file fills its factors."""

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.site.module if isinstance(self.site, View) else self.site
        return module

    @property
    def specs(self) -> dict[str, FactorSpec]:
        return self.adapter.specs

    @property
    def r(self) -> int:
        return self.adapter.r

    @property
    def alpha(self) -> float:
        return self.adapter.alpha

    @property
    def scaling(self) -> float:
        return self.adapter.scaling

    @property
    def parameters(self) -> int:
        return sum(prod(spec.shape) for spec in self.specs.values() if spec.trainable)


@dataclass
class Explanation:
    """What a configuration changes in a model. `str()` gives a table."""

    layers: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why it is skipped."""
    saved: dict[str, str] = field(default_factory=dict)
    """Name -> why it is trained and saved whole."""
    biases: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    """Those that are trained whole with one weight."""
    others: list[Planned] = field(default_factory=list)
    """The parts of kinds from other packages."""
    notes: list[str] = field(default_factory=list)

    def declared(self) -> Iterator[tuple[str, Mapping[str, FactorSpec]]]:
        """(path, declaration) of all tensors that are not copies of the base's."""
        for target in self.layers:
            yield target.path, target.specs
        for planned in self.others:
            yield planned.path, planned.specs

    def parted(self, model: nn.Module) -> list[str]:
        """The modules with the weight of the input embedding that would get other values than the rest of them.

        Those of `tied` are not among them.

        As in PEFT, rows of tokens count only if several of these modules are named with different ones.
        """
        rows = [each.path for each in self.others if issubclass(each.kind, TokenRows) and each.options[2]]
        layers = [target.path for target in self.layers]
        parted = parted_by(model, layers, self.saved, rows if len(rows) > 1 else ())
        return [name for name in parted if name not in self.tied]

    def tie(self, model: nn.Module, enough: Callable[[Iterable[bool]], bool]) -> list[str]:
        """Train whole with one weight what has that of the input embedding, if `enough` of it is trained whole.

        Not if nothing calls one of these modules: a copy of it would never run.

        Args:
            enough: `any`, and the others are added, or `all`.

        Returns:
            the modules that get other values in spite of that.
        """
        users, uncalled = tied_with_embedding(model), uncalled_embeddings(model)
        if users and enough(name in self.saved for name in users) and not any(name in uncalled for name in users):
            self.saved |= {name: f"tied to {users[0]}" for name in users if name not in self.saved}
            self.tied = users
        return self.parted(model)

    def __str__(self) -> str:
        from .report import explanation_table

        return explanation_table(self)


def explain_targets(model: nn.Module, config: object = None) -> Explanation:
    """Every layer that `config` would adapt, with shape, rank, alpha and parameters, and what it would skip.

    The model does not change.

    Raises:
        TargetError: lists every pattern that matches nothing and every named module that cannot be adapted.
    """
    call = "explain_targets(model, config)"
    return resolve(model, LoraConfig.from_any(config), call, allow_bypassed=True, explain=True)


def resolve(
    model: nn.Module,
    config: LoraConfig,
    call: str,
    allow_bypassed: bool = False,
    from_file: bool = False,
    explain: bool = False,
    saved: dict[str, str] | None = None,
) -> Explanation:
    """The plan of an injection.

    Args:
        allow_bypassed: adapt named layers even if their parent multiplies by their weight directly.
        from_file: the configuration comes from an adapter's file, whose tensors decide: patterns that match nothing
            are not faults.
        explain: note what would be in no file, instead of refusing it.
        saved: name -> reason, for the modules to train whole; default: as the configuration says.
    """
    faults = Faults(call)
    check_names(config, faults)
    if not from_file:
        check_alphas(config, faults)
    faults.check(ConfigError, "Correct the configuration, or import the package that registers these names.")
    plan, method = Explanation(), METHODS[config.method]
    init, options = cast(tuple[Init, str], find_init(config.init_lora_weights))
    init = init.with_settings(settings_of(config, options))
    init = (init.of_file() if from_file else None) or init  # a file whose product is lost was refused when it was read
    check_pair(config, init, method, faults)
    if (refused := method.refuse_model(model)) is not None:
        faults.add(f"method={config.method!r}: {refused}")
    faults.check(ConfigError, "Choose another initialization, or another method.")
    modules = dict(original_modules(model))
    whole = _saved_modules(model, modules, config, faults) if saved is None else saved
    plan.saved = _called(whole, modules, faults)
    if config.ensure_weight_tying and not from_file:
        plan.tie(model, any)
    _refuse_packed(modules, plan.saved, faults)
    selection = Selection(modules, config, plan.saved, faults, allow_bypassed=allow_bypassed, from_file=from_file)
    chosen, plan.skipped = selection.chosen, selection.skipped
    plan.layers = list(_layers(chosen, config, method, init, options, from_file, faults))
    plan.biases = _bias_modules(modules, config, chosen, plan) if config.bias != "none" else []
    plan.others = list(_other_parts(config, modules, plan.saved, selection, faults))
    if config.ensure_weight_tying and not from_file and (parted := plan.parted(model)):
        faults.add(
            f"ensure_weight_tying=True: {', '.join(parted)} would be trained apart from the modules with the same "
            "weight; leave it out for that, train them whole (modules_to_save), or rows of tokens "
            "(trainable_token_indices)"
        )
    unsaved = None if from_file else why_unsaved(model, plan.saved, planned_rows(plan.others))
    if unsaved is not None and not explain:
        faults.add(unsaved)
    faults.check(TargetError, "Load the adapter with the library that wrote it." if from_file else NEXT_STEP)
    plan.notes = [*_notes(modules, plan), *([unsaved] if unsaved else [])]
    excess = None if from_file else _excess(plan.layers)
    if excess is not None:
        plan.notes.append(excess)
    if excess is not None and not explain:
        logger.warning(f"{call}: {excess}.")
    return plan


def _layers(
    chosen: Mapping[str, tuple[Shape, list[tuple[Any, Storage]]]],
    config: LoraConfig,
    method: Method,
    init: Init,
    options: str,
    from_file: bool,
    faults: Faults,
) -> Iterator[Target]:
    """The sites of the chosen modules, with the rank and alpha of each."""
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    tables = (ranks, config.r), (alphas, config.alpha)
    for path, (shape, sites) in chosen.items():
        dropout = 0.0 if shape.looks_up else config.lora_dropout
        for site, storage in sites:
            name = f"{path}.{site.name}" if isinstance(site, View) else path
            r, alpha = (table.of(name, path, wanted) for table, wanted in tables)
            refused = shape.refuse_rank(site, r) or method.refuse(site, shape)
            own = INITS["kaiming"] if from_file and init.takes_out and shape.looks_up else init  # as in PEFT
            scaling = config.scaling(r, alpha)
            refused = refused or own.refuse(site, shape) or own.refuse_rank(site, shape, r)
            refused = refused or own.refuse_scaling(scaling)
            if refused is not None:
                faults.add(f"{name}: {refused}")
                continue
            specs = own.declare(shape, method.declare(site, shape, r))
            adapter = LayerAdapter(method, specs, r, alpha, scaling, dropout, own)
            yield Target(name, path, site, shape, storage, adapter, options, from_file=from_file)
    for field_name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if not from_file else ():
        for key in table.unused():
            faults.add(f"{field_name}[{key!r}] matches no adapted layer{nearest(key, last_names(chosen))}")


def _other_parts(
    config: LoraConfig, modules: dict[str, nn.Module], saved: Mapping[str, str], selection: Selection, faults: Faults
) -> Iterator[Planned]:
    """The parts of other kinds that the configuration asks for."""
    for kind, wanted in requested_parts(config).items():
        for planned in PARTS[kind].plan(wanted, modules, faults):
            planned.kind = PARTS[kind]
            if (why := selection.why_bypassed(planned.path)) is not None:
                faults.add(f"{planned.path}: {why}")
            if not planned.specs and planned.path in selection.chosen:
                faults.add(
                    f"{planned.path}: it shares its weight with a module whose tensors are trained, so it cannot be "
                    "adapted too; leave it out of target_modules"
                )
            if (above := holder(planned.path, saved)) is None:
                yield planned
            elif planned.specs:  # otherwise it would only follow another module
                faults.add(f"{planned.path}: {above} is trained whole, so nothing else of the adapter would act in it")


def _excess(targets: list[Target]) -> str | None:
    """A note about ranks above the highest that the update of a layer can have."""
    limits = {
        t.name: min(prod(spec.shape) // t.r for spec in t.specs.values() if "R" in spec.axes)
        for t in targets
        if any("R" in spec.axes for spec in t.specs.values())
    }
    wide = [t for t in targets if t.r > limits.get(t.name, t.r)]
    if not wide:
        return None
    first, more = wide[0], f" and {len(wide) - 1} more layers" if len(wide) > 1 else ""
    return (
        f"r={first.r} is above the highest rank that an update of {first.name}{more} can have ({limits[first.name]}, "
        "the smaller of its numbers of inputs and outputs): a lower r does the same with fewer parameters"
    )


def _saved_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, faults: Faults
) -> dict[str, str]:
    if config.modules_to_save is None:
        return find_heads(model)
    saved: dict[str, str] = {}
    unmatched, hits = set(config.modules_to_save), matcher(config.modules_to_save)
    for name in modules:
        hit = hits(name)
        if hit and holder(name, saved) is None:
            saved[name] = "named in modules_to_save"
        unmatched.difference_update(hit)
    for name, why in uncalled_embeddings(model).items():
        if name in saved:
            faults.add(f"{name} cannot be trained whole: {why}")
    for pattern in sorted(unmatched):
        hint = same_module(model, [pattern]) or nearest(pattern, all_names(modules))
        faults.add(f"modules_to_save: {pattern!r} matches no module{hint}")
    return saved


def _called(saved: Mapping[str, str], modules: Mapping[str, nn.Module], faults: Faults) -> dict[str, str]:
    """The modules to train whole, with the contents of containers in place of these."""
    found = {path: why for name, why in saved.items() for path in called_parts(name, modules[name])}
    for path in found:
        reason = why_not_called(modules[path])
        if reason is not None:
            faults.add(f"{path}: {reason}")
        if is_offloaded(modules[path]):
            faults.add(f"{path} would be trained whole but is offloaded; keep it in memory (device_map)")
    return found


def _refuse_packed(modules: dict[str, nn.Module], saved: dict[str, str], faults: Faults) -> None:
    """Refuse to train a quantized module whole, and quantized layers with a dense weight, which cannot run."""
    unfinished = {n: m for n, m in modules.items() if is_unfinished(m)}
    heads = {n: why for n, why in saved.items() if any(is_packed(p) for p in modules[n].parameters())}
    heads |= {path: saved[path] for n in unfinished if (path := holder(n, saved)) is not None}
    others = [n for n in unfinished if holder(n, heads) is None]
    skip = f"llm_int8_skip_modules or modules_to_not_convert: {[*heads, *others]!r}"
    for name, why in heads.items():
        faults.add(
            f"{name} would be trained whole ({why}) but is quantized. Load the base with all such modules excluded "
            f"from quantization ({skip})"
        )
    for name in others:
        faults.add(
            f"{name} has a quantized forward but its weight was never quantized, as happens if the base checkpoint "
            f"lacks it. Load the base with all such modules excluded from quantization ({skip})"
        )


def _bias_modules(
    modules: dict[str, nn.Module], config: LoraConfig, chosen: Container[str], plan: Explanation
) -> list[str]:
    """The layers whose bias is trained: all that have one, or those with factors; a bias that several hold once.

    A module without a weight, such as a head for masked tokens, holds the bias of a layer inside it.
    """
    found: dict[int, str] = {}
    for name, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is None or not bias.is_floating_point() or (config.bias == "lora_only" and name not in chosen):
            continue
        if holder(name, plan.saved) is not None:
            continue
        is_layer = name in chosen or "weight" in module._parameters or "parametrizations" in module._modules
        if not is_layer:
            plan.skipped[f"{name}.bias"] = f"{type(module).__name__} has no weight"
        elif id(bias) in found:
            plan.skipped[f"{name}.bias"] = f"is the bias of {found[id(bias)]}"
        else:
            found[id(bias)] = name
    return list(found.values())


def _notes(modules: dict[str, nn.Module], plan: Explanation) -> list[str]:
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    notes = [
        f"{planned.path}: the rows of {len(planned.options[0])} tokens are trained"
        for planned in plan.others
        if issubclass(planned.kind, TokenRows)
    ]
    for target in plan.layers:
        holder = target.name.rpartition(".")[0] if isinstance(target.site, View) else target.name
        shared = [n for n in users.get(id(target.site._parameters.get("weight")), ()) if n != holder]
        if shared:
            notes.append(
                f"{target.name} shares its weight with {', '.join(shared)}: it can be trained, saved and loaded, but "
                "merging it needs untie=True"
            )
    return notes
