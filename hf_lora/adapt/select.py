"""Which modules the patterns of a configuration select, and what is wrong with patterns that select nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ALL_LINEAR, ATTENTION, PRESETS, LoraConfig, as_tuple
from ..errors import Faults, nearest
from ..layers.class_swap import refuse_instance_forward
from ..layers.contract import Shape, Storage
from ..layers.shapes import shape_of
from ..layers.storages import quantization_of, storage_of, why_no_storage
from .bypass import bypassed_modules, uncalled_embeddings
from .embeddings import output_embeddings
from .heads import outside_backbone
from .match import holder, layer_index, matcher
from .ties import same_module
from .unsaved import modules_in_no_checkpoint

ONLY_WHOLE = "matches only modules that are trained whole; leave them out of modules_to_save ([]: none) to adapt them"
ONLY_NEW = "matches only modules that the base checkpoint lacks, which are trained whole; leave it out"
ONLY_OUTSIDE = "matches only modules outside layers_to_transform"
ONLY_CONTAINERS = "matches only containers of layers, which have no weight themselves"

Matcher = Callable[[str, nn.Module], list[str]]
"""(name, module) -> the patterns of `target_modules` that match it."""


class Selection:
    """The layers to adapt, selected in one pass over a model's modules.

    Args:
        modules: original name -> module; the root has an empty name.
        saved: names of the modules that are trained whole.
        faults: collects named modules that cannot be adapted, and patterns without effect.
        allow_bypassed: select named layers even if their parent multiplies by their weight directly.
        from_file: the tensors of a file decide, so only a target that matches nothing at all is a fault.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        config: LoraConfig,
        saved: Iterable[str],
        faults: Faults,
        *,
        allow_bypassed: bool,
        from_file: bool,
    ) -> None:
        self.chosen: dict[str, tuple[Shape, list[tuple[Any, Storage]]]] = {}
        """Name -> its shape, and its sites with their storages."""
        self.skipped: dict[str, str] = {}
        """Name -> why it is skipped."""
        self._modules = modules
        self._config = config
        self._saved = frozenset(saved)
        self._new = frozenset(modules_in_no_checkpoint(modules[""]))
        self._faults = faults
        self._allow_bypassed = allow_bypassed
        self._from_file = from_file
        self._preset = config.target_modules in PRESETS
        layers = config.layers_to_transform
        self._layers = None if layers in (None, []) else as_tuple(layers)
        self._excludes = matcher(config.exclude_modules or [])
        self._bypassed = {} if from_file else bypassed_modules(modules[""])
        self._uncalled = {} if from_file else uncalled_embeddings(modules[""])
        # Patterns with an effect so far, and what is wrong with the modules that a pattern matched.
        self._hit: set[str] = set()
        self._excluded: set[str] = set()
        self._layers_hit: set[int] = set()
        self._elsewhere: dict[str, str] = {}

        wanted = _matcher(modules[""], config)
        for name, module in modules.items():
            patterns = wanted(name, module) if name else []
            if patterns:
                self._consider(name, module, patterns)
        self._unmatched_targets()
        if not from_file:
            self._unmatched_limits()
        if not self.chosen and not faults.found:
            faults.add(f"target_modules={config.target_modules!r} selects no layer to adapt")

    def _consider(self, name: str, module: nn.Module, patterns: list[str]) -> None:
        """Skip a module because of its name, otherwise check the module itself."""
        whole = holder(name, self._saved)
        if self._is_excluded(name):
            self.skipped[name] = "excluded by exclude_modules"
            self._hit.update(patterns)
        elif whole is not None:
            self.skipped[name] = f"trained whole, as part of {whole}"
            self._elsewhere |= dict.fromkeys(patterns, ONLY_NEW if whole in self._new else ONLY_WHOLE)
        elif name not in patterns and not self._is_in_layers(name):  # as in PEFT, a whole name needs no index
            self.skipped[name] = "its layer is not in layers_to_transform"
            self._elsewhere |= dict.fromkeys(patterns, ONLY_OUTSIDE)
        else:
            self._judge(name, module, patterns)

    def _judge(self, name: str, module: nn.Module, patterns: list[str]) -> None:
        reason, shape, sites = judge(module)
        if reason == "" and not self._preset:  # a container, which the pattern does not mean
            self._elsewhere = dict.fromkeys(patterns, ONLY_CONTAINERS) | self._elsewhere
            return
        self._hit.update(patterns)
        reason = reason or self.why_bypassed(name, self._preset)
        reason = reason or self._uncalled.get(name)
        if reason is None and shape is not None:
            self.chosen[name] = shape, sites
        elif self._preset:
            self.skipped[name] = reason or "has no weight itself"
        else:
            self._faults.add(f"{name}: {reason}")

    def why_bypassed(self, name: str, preset: bool = False) -> str | None:
        """Why what an adapter changes at a module might never act; None if it does, or if that is allowed."""
        if name not in self._bypassed or (self._allow_bypassed and not preset):
            return None
        return self._bypassed[name] + ("" if preset else " (pass allow_bypassed=True to adapt it anyway)")

    def _is_excluded(self, name: str) -> bool:
        hit = self._excludes(name)
        self._excluded.update(hit)
        return bool(hit)

    def _is_in_layers(self, name: str) -> bool:
        if self._layers is None:
            return True
        index = layer_index(name, self._config.layers_pattern)
        if index is None or index not in self._layers:
            return False
        self._layers_hit.add(index)
        return True

    def _unmatched_targets(self) -> None:
        targets = self._config.target_modules
        for pattern in as_tuple(targets):
            if pattern in self._hit:
                continue
            found = self._elsewhere.get(pattern)
            if found is not None:
                reported = found == ONLY_OUTSIDE and not self._layers_hit  # each of the layers is a fault already
                if not self._from_file and not reported:
                    self._faults.add(f"target_modules: {pattern!r} {found}")
            elif self._preset:
                self._faults.add(
                    f"target_modules={pattern!r} finds no layer outside the head; name layers, such as convolutions"
                )
            elif not self._from_file or isinstance(targets, str):
                wanted = targets if isinstance(targets, str) else [pattern]
                hint = same_module(self._modules[""], wanted) or nearest(pattern, self._names())
                self._faults.add(f"target_modules: {pattern!r} matches nothing{hint}")

    def _unmatched_limits(self) -> None:
        for pattern in as_tuple(self._config.exclude_modules or ()):
            if pattern not in self._excluded:
                near = nearest(pattern, self._names())
                self._faults.add(f"exclude_modules: {pattern!r} excludes none of the targets{near}")
        for index in self._layers or ():
            if index not in self._layers_hit:
                self._faults.add(f"layers_to_transform: layer {index} contains no target")

    def _names(self) -> list[str]:
        return all_names(self._modules)


def why_not(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted; None if it can; an empty string if it is not a layer."""
    return judge(module)[0]


def judge(module: nn.Module) -> tuple[str | None, Shape | None, list[tuple[Any, Storage]]]:
    """The result of `why_not`, and for a module that can be adapted its shape and its sites with their storages."""
    computed = hasattr(module, "parametrizations")
    shape = shape_of(module)
    is_container = not module._parameters or ("weight" not in module._parameters and module._modules)
    if shape is None and not computed:
        reason = "" if is_container else f"{type(module).__name__} is not a supported kind of layer"
        return reason, None, []
    if shape is None:
        return why_no_storage(module), None, []
    sites: list[tuple[Any, Storage]] = []
    for site in shape.sites(module):
        storage = storage_of(site)
        if storage is None:
            return why_no_storage(site), shape, []
        sites.append((site, storage))
    return shape.refuse(module) or refuse_instance_forward(module), shape, sites


def all_names(modules: Iterable[str]) -> list[str]:
    """Last components of names, then whole names: candidates for a mistyped pattern."""
    names = list(modules)
    return [*last_names(names), *names]


def last_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _matcher(model: nn.Module, config: LoraConfig) -> Matcher:
    if config.target_modules in PRESETS:
        return _preset(model, str(config.target_modules))
    hits = matcher(config.target_modules)
    return lambda name, module: hits(name)


def _preset(model: nn.Module, preset: str) -> Matcher:
    """The modules that a preset means; those of them that are skipped are listed."""
    outputs = {id(m) for m in output_embeddings(model)}
    heads = tuple(f"{n}." for n in outside_backbone(model))
    blocks: set[str] = set()

    def all_linear(name: str, module: nn.Module) -> list[str]:
        linear = isinstance(module, (nn.Linear, Conv1D)) or quantization_of(module) is not None
        return [ALL_LINEAR] if linear and id(module) not in outputs and not f"{name}.".startswith(heads) else []

    def attention(name: str, module: nn.Module) -> list[str]:
        if _is_attention(name, module):
            blocks.add(name)
        parents = (name[:i] for i, c in enumerate(name) if c == ".")
        return [ATTENTION] if all_linear(name, module) and any(p in blocks for p in parents) else []

    return all_linear if preset == ALL_LINEAR else attention


def _is_attention(name: str, module: nn.Module) -> bool:
    words = (type(module).__name__ + " " + name.rpartition(".")[2]).lower()
    return "attention" in words or "attn" in words
