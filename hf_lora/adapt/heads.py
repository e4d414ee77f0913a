"""Which modules are the task head: those missing from the base checkpoint, which must be trained and saved whole.

transformers marks each parameter that it loads from a checkpoint with `_is_hf_initialized`. If any parameter is
marked, unmarked ones are new. A model created from a config, or a deep copy, has no marks: its head is everything
outside the backbone (`base_model_prefix`), except the output embedding of a language model.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.distributed import whole_numel, whole_shape
from ..layers.shapes import runs_forward_of
from .embeddings import checkpoint_vocabulary, output_embedding, vocabulary_of
from .match import holder
from .walk import module_at, original_modules


def is_marked(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def mark_like(new: Tensor, old: Tensor) -> None:
    """Mark a parameter that takes the place of another as that one is."""
    new._is_hf_initialized = is_marked(old)  # type: ignore[attr-defined]


def has_marks(model: nn.Module) -> bool:
    """Whether any parameter of the base is marked as loaded from a checkpoint."""
    parameters = (p for _, module in original_modules(model) for p in module._parameters.values())
    return any(p is not None and is_marked(p) for p in parameters)


def is_random(model: nn.Module) -> bool:
    """Whether a transformers model was created from a config, so that the weights of its base are random."""
    config = getattr(model, "config", None)
    return config is not None and not getattr(config, "_name_or_path", "") and not has_marks(model)


def outside_backbone(model: nn.Module) -> list[str]:
    """Names of the model's children with parameters outside its backbone; empty if it has no separate backbone.

    A backbone with less than half of the parameters does not count as one.
    """
    prefix = getattr(model, "base_model_prefix", "")
    backbone = model._modules.get(prefix) if prefix else None
    if backbone is None:
        return []
    children = {name: m for name, m in model._modules.items() if m is not None and name != prefix}
    outside = {name: size for name, m in children.items() if (size := _size(m))}
    return list(outside) if _size(backbone) >= sum(outside.values()) else []


def _size(module: nn.Module) -> int:
    """Number of parameters, without those of adapters."""
    found = {id(p): p for _, m in original_modules(module) for p in m._parameters.values() if p is not None}
    return sum(map(whole_numel, found.values()))


def has_outputs(head: nn.Module, count: int | None) -> bool:
    """Whether a module may be the task head for `count` labels: it has as many outputs, or one more for no object."""
    outputs = {shape[0] for shape in map(whole_shape, head.parameters()) if shape}
    return count is not None and not outputs.isdisjoint((count, count + 1))


def find_heads(model: nn.Module) -> dict[str, str]:
    """Name -> reason, for the outermost modules that the base checkpoint lacks."""
    if has_marks(model):
        return dict.fromkeys(new_modules(model), "not in the base checkpoint")
    if output_embedding(model) is not None:
        return {}
    return dict.fromkeys(outside_backbone(model), "the task head, outside the backbone")


def called_parts(name: str, module: nn.Module) -> list[str]:
    """The modules to train whole for `name`: itself, or the contents of a container that its parent may index.

    A parent calls the modules inside `nn.ModuleList`, `nn.ModuleDict` and, as it likes, `nn.Sequential` one by one. A
    module that nothing calls cannot be replaced by a copy; what has parameters of its own and no forward is in the
    result as it is, for `why_not_called`.
    """
    if why_not_called(module) is not None or not (_is_uncalled(module) or runs_forward_of(module, nn.Sequential)):
        return [name]
    held = ((f"{name}.{key}", child) for key, child in module.named_children())
    return [
        found for path, child in held if any(True for _ in child.parameters()) for found in called_parts(path, child)
    ]


def why_not_called(module: nn.Module) -> str | None:
    """Why a copy of `module` would not run in its place; None if it would, or if its contents are taken instead."""
    if _is_uncalled(module) and any(p is not None for p in module._parameters.values()):
        return f"{type(module).__name__} has no forward, so a copy of it would never run; name the module around it"
    return None


def _is_uncalled(module: nn.Module) -> bool:
    return runs_forward_of(module, nn.Module)


def new_modules(model: nn.Module) -> list[str]:
    """The outermost modules that a model's checkpoint lacks; empty if nothing is marked."""
    found = _unmarked(model) if has_marks(model) else []
    if found and _is_resized(model):  # transformers then created a new output embedding with the base's rows
        head = output_embedding(model)
        found = [name for name in found if module_at(model, name) is not head]
    return found


def _is_resized(model: nn.Module) -> bool:
    return checkpoint_vocabulary(model) not in (None, vocabulary_of(model))


def _unmarked(model: nn.Module) -> list[str]:
    found: list[str] = []
    held = set[str]()
    for name, module in original_modules(model):
        if not name or holder(name, held) is not None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        parameters = list(module.parameters())
        if parameters and not any(is_marked(p) for p in parameters):
            found.append(name)
            held.add(name)
    return found
