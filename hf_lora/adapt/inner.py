"""The transformers models of a model with adapters: what they refuse, and that inner ones save no files.

In: a module whose transformers models have their extended class. Out: marks on these models, and errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import StateError, TrainingError
from ..layers.class_swap import mixins_of
from ..layers.hosts import Host
from .checkpointing import release_hooks
from .state import LoraState, state_of

if TYPE_CHECKING:
    from transformers import Trainer

_OUTER = "_hf_lora_outer"
_STATE = "_hf_lora_state_around"


def mark_inner(model: nn.Module, inner: nn.Module, path: str) -> None:
    """Note on `inner` that its adapters belong to `model`, in which it is at `path`."""
    name = type(model).__name__
    inner.__dict__[_STATE] = state_of(model)
    if isinstance(model, PreTrainedModel):
        inner.__dict__[_OUTER] = (
            f"{name} with adapters. Call it on the {name}, so that the names in the file can be loaded."
        )
        return
    inner.__dict__[_OUTER] = (
        f"{name} with adapters, which has no such methods. Either fold them in and go on with the plain model: "
        "from hf_lora.adapt.merge import merge_for_good; merge_for_good(model). Or save them: from "
        "hf_lora.files.save import save_adapter; save_adapter(model, folder), with hf_lora.files.load.load_adapter as "
        f"its counterpart. Here `model` is the {name}. In the next run, apply_lora(model.get_submodule({path!r}), "
        "config) gives the inner model the methods of a LoraModel."
    )


def state_around(model: nn.Module) -> LoraState | None:
    """The state of a model with adapters, also for the models inside it."""
    return state_of(model) or model.__dict__.get(_STATE)


def outermost_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models in `model` that are in no other: itself, if it is one."""
    stack = [model]
    while stack:
        module = stack.pop()
        if isinstance(module, PreTrainedModel):
            yield module
        else:
            stack.extend(module.children())


def adapted_part(model: nn.Module) -> nn.Module:
    """The module that has, or is to get, the adapters: the model, or a transformers model that is all of it.

    Wrappers that save their parts themselves, as those of sentence-transformers do, then write and load the adapter as
    a part. Their other parameters must be those of modules with a `save` of their own, such as dense layers, because
    no file of an adapter would hold them.
    """
    saves_itself = hasattr(type(model), "save_pretrained")  # of the class: a compiled model has its model's attributes
    if not saves_itself or isinstance(model, PreTrainedModel) or state_of(model) is not None:
        return model
    inner = list(outermost_models(model))
    if len(inner) != 1 or not _saves_the_rest(model, inner[0], {id(p) for p in inner[0].parameters()}):
        return model
    return inner[0]


def _saves_the_rest(module: nn.Module, inner: nn.Module, inside: set[int]) -> bool:
    """Whether each parameter of `module` is one of `inner`, or belongs to a module beside it that saves itself."""
    if module is inner:
        return True
    return all(id(p) in inside for p in module.parameters(recurse=False)) and all(
        (hasattr(type(child), "save") and inner not in child.modules()) or _saves_the_rest(child, inner, inside)
        for child in module.children()
    )


def outside(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model that are not those of its `adapted_part`, by their names."""
    inner = adapted_part(model)
    if inner is model:
        return {}
    inside = {id(tensor) for tensor in (*inner.parameters(), *inner.buffers())}
    named: Iterator[tuple[str, Tensor]] = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in named if id(tensor) not in inside}


def refuse_arguments_of_peft(model: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Refuse arguments of PEFT's forward that most models would accept and ignore.

    Raises:
        StateError: such an argument is given.
    """
    for name, step in _OF_PEFT.items():
        if kwargs.get(name) is not None:
            raise StateError(f"{type(model).__name__}(…, {name}=…) is not supported. {step}")


_OF_PEFT = {
    "adapter_names": "Call the model once for each adapter, with the rows of that adapter: model.set_adapter(name).",
    "alora_offsets": "Leave it out: the model looks for the invocation tokens in input_ids itself.",
}
"""Arguments of PEFT's forward that are not supported -> the next step."""


def refuse_best_model(trainer: Trainer | None) -> None:
    """Refuse a plain Trainer that would look for a full model in its best checkpoint, after the last step.

    Raises:
        TrainingError: it has `load_best_model_at_end`.
    """
    if trainer is not None and trainer.args.load_best_model_at_end:
        raise TrainingError(
            f"{type(trainer).__name__}.train: with load_best_model_at_end, the run would fail at its end, because "
            "transformers.Trainer expects a full model in the best checkpoint, which contains only adapters. Train "
            "with hf_lora.LoraTrainer, or set load_best_model_at_end=False and load the checkpoint that you want with "
            "model.load_adapter_weights(checkpoint)."
        )


def end_models(model: nn.Module) -> None:
    """Restore the class of a model without adapters and of the transformers models in it, and remove their hooks."""
    for module in model.modules():
        extensions = [mixin for mixin in mixins_of(module) if not issubclass(mixin, Host)]
        if not extensions:
            continue
        release_hooks(module)
        for mixin in extensions:
            mixin.shrink(module)
        module.__dict__.pop(_OUTER, None)
        module.__dict__.pop(_STATE, None)


def refuse_inner(model: nn.Module, call: str) -> None:
    """Refuse an inner model of a model with adapters: its file would have names that cannot be loaded.

    Raises:
        StateError: `model` is such an inner model.
    """
    outer = model.__dict__.get(_OUTER)
    if outer is not None and state_of(model) is None:
        raise StateError(f"{call}: this {type(model).__name__} is part of a {outer}")
