"""`LoraModel`: a transformers model with methods for adapters. Each method calls a function of a lower package."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapt.activation import set_active
from .adapt.batchnorm import hold_batchnorm
from .adapt.calls import told
from .adapt.checkpointing import is_checkpointing, refuse_checkpointed, release_input_grads, require_input_grads
from .adapt.inject import delete
from .adapt.inner import mark_inner, outermost_models, refuse_arguments_of_peft, refuse_best_model, refuse_inner
from .adapt.labels import add_with_labels
from .adapt.merge import disabled, merge, merge_for_good, set_enabled, unload, unmerge
from .adapt.report import adapter_table, trainable_line
from .adapt.resize import resizing
from .adapt.state import LoraState, require_state, state_of
from .adapt.ties import original_weights
from .compat import running_trainer
from .config import LoraConfig, as_tuple
from .errors import AdapterFileError, StateError, listed
from .files.format import AdapterFile
from .files.keys import PREFIX
from .files.load import load_adapter, load_adapter_weights
from .files.save import adapter_state_dict, refuse_arguments, save_adapter, save_adapters
from .hub.download import local_adapter
from .hub.share import push_model
from .layers.base import MERGED_TRAINING
from .layers.class_swap import Extension, unwrap_class
from .load import load_lora

M = TypeVar("M", bound=nn.Module)
logger = logging.get_logger(__name__)


class LoraModel(Extension, PreTrainedModel):
    """A transformers model with adapters, created by `apply_lora` or `LoraModel.from_pretrained`, not a constructor.

    Its class is a subclass of `LoraModel` and of the base's class, and has the base's name.
    """

    _hf_peft_config_loaded = True  # transformers then does not handle adapters, and allows training a quantized base

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Constructing the class of an adapted model returns the plain base."""
        if cls is LoraModel:
            raise StateError(
                "LoraModel has no constructor. Call apply_lora(model, config), or LoraModel.from_pretrained(adapter)."
            )
        base = unwrap_class(cls)
        if base is cls or not (args or kwargs):  # without arguments: a replica of nn.DataParallel, filled later
            return object.__new__(cls)
        return base(*args, **kwargs)

    @staticmethod
    def begin(model: nn.Module) -> None:
        """Extend the class of a model that now has adapters, if it is one of transformers, and of those inside it."""
        for path, module in list(model.named_modules()):
            if isinstance(module, PreTrainedModel) and not isinstance(module, LoraModel):
                LoraModel.extend(module)
                if module is not model:
                    mark_inner(model, module, path)
        for outermost in outermost_models(model):
            assert isinstance(outermost, LoraModel)
            if is_checkpointing(outermost):
                outermost.enable_input_require_grads()
        if isinstance(model, LoraModel) and model.training:
            model.train()  # sets a frozen BatchNorm to eval

    # Loading ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter with its base model: see `hf_lora.load.load_lora`.

        PEFT's order of arguments works too: (model, adapter, adapter_name, is_trainable).
        """
        if cls is not LoraModel:
            return unwrap_class(cls).from_pretrained(*args, **kwargs)  # type: ignore[attr-defined]
        if len(args) > 1 and isinstance(args[0], nn.Module):
            model, adapter, *more = args
            given = dict(zip(("adapter_name", "is_trainable"), more[:2], strict=False))
            return load_lora(cls, adapter, *more[2:], base_model=model, **given, **kwargs)
        return load_lora(cls, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return unwrap_class(cls)._from_config(config, **kwargs)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """PyTorch's method, which also accepts the keys of an adapter's file.

        Raises:
            AdapterFileError: no key belongs to this model, or the keys of an adapter do not fit it.
        """
        state = state_of(self)
        if state is not None:
            state.refuse_merged("load_state_dict")
        if state is not None and any(key.startswith(PREFIX) for key in state_dict):
            load_adapter_weights(self, state_dict, _first_active(self, "load_state_dict"))
            return nn.modules.module._IncompatibleKeys([], [])
        if state_dict and not any(key in state_dict for key in self.state_dict()):
            raise AdapterFileError(
                f"load_state_dict: none of the {len(state_dict)} keys belongs to this model "
                f"({listed(state_dict, 3)}). The keys of an adapter's file begin with 'base_model.model.'."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # Saving ----------------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        adapter_name: str | None = None,
        allow_nonfinite: bool = False,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Save only the adapters, in PEFT's format plus `hf_lora.json`. All files of an adapter are replaced together.

        Args:
            adapter_name: the adapter to save. None saves all: a single one, and one named "default", to the folder
                itself, others to subfolders with their names.
            state_dict: gathered tensors by their names in `self.state_dict()`, written instead of the model's.
            allow_nonfinite: also write NaN and infinity, for inspection; loading refuses such a file.
            dtype: of the tensors in the file, such as `torch.bfloat16`; default: float32, as in memory.

        Raises:
            StateError: the model is an inner model, is merged, or has no adapters.
            ConfigError: arguments that change how a full model is saved.
            AdapterFileError: a tensor is empty or not finite, or the disk is full; existing files are unchanged.
        """
        state = _state(self, "save_pretrained")
        if state.activity.merged:
            raise StateError(
                "save_pretrained: the adapters are merged. Call unmerge_adapter() to save them, or "
                "merge_and_unload().save_pretrained(folder) to save the merged model."
            )
        of_push = inspect.signature(push_model).parameters if push_to_hub else {}
        pushing = {name: kwargs.pop(name) for name in list(kwargs) if name in of_push}
        refuse_arguments(kwargs)
        if not is_main_process:
            return
        if adapter_name is None:
            save_adapters(self, save_directory, state_dict, allow_nonfinite, dtype)
        else:
            save_adapter(self, save_directory, adapter_name, state_dict, allow_nonfinite, dtype)
        if not re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            logger.info(f'Saved. Load it with: LoraModel.from_pretrained("{os.fspath(save_directory)}")')
        elif not state.resumable:
            state.resumable = True  # one warning is enough
            logger.warning(
                f"{save_directory} contains only the adapter. To resume from it, train with hf_lora.LoraTrainer "
                "instead of transformers.Trainer, which expects full weights."
            )
        if push_to_hub:
            self.push_to_hub(pushing.pop("repo_id", Path(save_directory).name), **pushing)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Push the adapters with a card as one commit: see `hub.share.push_model` for the arguments."""
        _state(self, "push_to_hub").refuse_merged("push_to_hub")
        return push_model(self, repo_id, **kwargs)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of one adapter (default: the first active one) by the keys of its file, without copies.

        Args:
            state_dict: gathered tensors by their names in `self.state_dict()`, in place of the model's.
        """
        return adapter_state_dict(self, adapter_name or _first_active(self, "get_adapter_state_dict"), state_dict)

    # Adapters --------------------------------------------------------------------------------------------------------

    @property
    def lora_configs(self) -> dict[str, LoraConfig]:
        """The configuration of each adapter; empty for an inner model of a model with adapters."""
        state = state_of(self)  # no error: `hasattr` and tracing read every property
        return {name: record.config for name, record in state.adapters.items()} if state is not None else {}

    def add_adapter(
        self,
        name: str,
        config: Any = None,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        allow_bypassed: bool = False,
    ) -> None:
        """Add another adapter, optionally with its own labels, and make it the active one: see `apply_lora`."""
        if not isinstance(name, str):  # transformers' order: add_adapter(config, name)
            name, config = config or "default", name
        _state(self, "add_adapter")
        config = LoraConfig.from_any(config)
        add_with_labels(
            self, config, name, num_labels, id2label, allow_bypassed=allow_bypassed,
            call=f"add_adapter({name!r}, config)",
        )  # fmt: skip

    def load_adapter(  # type: ignore[override]
        self,
        adapter: str | os.PathLike[str] | AdapterFile,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        is_trainable: bool = False,
        allow_other_base: bool = False,
    ) -> None:
        """Add an adapter from a folder or the Hub, and make it the active one: see `files.load.load_adapter`."""
        _state(self, "load_adapter")
        where: Any = {"subfolder": subfolder, "cache_dir": cache_dir, "local_files_only": local_files_only}
        source = adapter if isinstance(adapter, AdapterFile) else local_adapter(adapter, revision, token, **where)
        load_adapter(self, source, adapter_name, is_trainable=is_trainable, allow_other_base=allow_other_base)

    def load_adapter_weights(self, adapter: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Load the values of a saved adapter into an existing one: see `files.load.load_adapter_weights`."""
        load_adapter_weights(self, adapter, adapter_name or _first_active(self, "load_adapter_weights"))

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters. If no other adapter is active then, the newest remaining one becomes active."""
        _state(self, "delete_adapter")
        delete(self, adapter_names)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate one adapter, or several together. Model and config get the labels of the head that then runs.

        Raises:
            StateError: a name is unknown, the model is merged, or the adapters conflict, such as with their own heads.
        """
        set_active(self, _state(self, "set_adapter"), as_tuple(adapter_name))

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(_state(self, "active_adapters").activity.active)

    def enable_adapters(self) -> None:
        """Enable the active adapters again."""
        _state(self, "enable_adapters")
        set_enabled(self, True)

    def enable_peft_hotswap(self, *_: Any, **__: Any) -> None:
        """Not supported: `load_adapter_weights` replaces the values of an adapter in place."""
        raise StateError(
            "enable_peft_hotswap is not supported. Call load_adapter_weights(adapter, name): it replaces the values "
            "of an adapter with the same layers and ranks in place, so that a compiled model stays valid."
        )

    def disable_adapters(self) -> None:
        """Disable the active adapters, even merged ones: the model computes the same as the base."""
        _state(self, "disable_adapters")
        set_enabled(self, False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable the adapters within a `with` block, and restore the previous state afterwards.

        Raises:
            StateError: a forward inside uses training mode with activation checkpointing and gradients; its backward
                would run the forward again with the adapters.
        """
        _state(self, "disable_adapter")
        guard = self.register_forward_pre_hook(refuse_checkpointed)
        try:
            with disabled(self):
                yield
            guard.remove()
        except BaseException:
            guard.remove()
            raise

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, *, untie: bool = False) -> None:
        """Merge the active adapters (or the named ones) into the weights; `unmerge_adapter` restores every bit.

        The originals of the merged weights are kept, which takes as much memory again. Not possible for a quantized
        base. See `adapt.merge.merge`.
        """
        _state(self, "merge_adapter")
        merge(self, adapter_names, untie=untie, call="merge_adapter")

    def unmerge_adapter(self) -> None:
        """Restore every bit of the base weights; those adapters are active that were before the merge."""
        _state(self, "unmerge_adapter")
        unmerge(self)

    def merge_and_unload(
        self, adapter_names: str | Sequence[str] | None = None, *, untie: bool = False
    ) -> PreTrainedModel:
        """Merge the active adapters into the weights and return the plain base model (the same object).

        A quantized base becomes a dense model, in the dtype of its other weights: see `adapt.dequantize`.
        """
        _state(self, "merge_and_unload")
        merge_for_good(self, adapter_names, untie=untie)
        return self

    def unload(self) -> PreTrainedModel:
        """Remove every adapter and return the plain base model (the same object), restored bit for bit."""
        _state(self, "unload")
        unload(self)
        return self

    # Reports ---------------------------------------------------------------------------------------------------------

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and all parameters, and the percentage."""
        print(trainable_line(self))

    def adapter_table(self, adapter_name: str | None = None) -> str:
        """A table of every adapted layer with shape, rank, alpha and parameters, and of skipped modules and why."""
        _state(self, "adapter_table")
        return adapter_table(self, adapter_name)

    # Overridden methods of transformers ------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_arguments_of_peft(self, kwargs)
        if (call := told(self, args, kwargs)) is None:
            return super().__call__(*args, **kwargs)
        with call.during():
            output = super().__call__(*args, **kwargs)
        call.after(output)
        return output

    def train(self, mode: bool = True) -> Self:
        """PyTorch's method. A frozen BatchNorm stays in eval mode: adapters do not save its running statistics."""
        state = state_of(self)
        if state is not None and mode and state.activity.merged:
            raise StateError(MERGED_TRAINING)
        if state is not None and mode and not state.resumable:
            refuse_best_model(running_trainer())
        super().train(mode)
        if state is not None and mode and state.has_batchnorm:
            hold_batchnorm(self)
        return self

    def enable_input_require_grads(self) -> None:
        """Make inputs of checkpointed layers require gradients; in a model without such layers, embedding outputs.

        With reentrant checkpointing, a layer gets no gradient if none of its inputs requires one.
        """
        self.disable_input_require_grads()
        self._require_grads_hooks = require_input_grads(self)

    def disable_input_require_grads(self) -> None:
        for hook in self.__dict__.pop("_require_grads_hooks", []):
            hook.remove()
        release_input_grads(self)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The method of transformers, for the weights of the base: an adapter's copy of one is never tied."""
        with original_weights(self):
            super().tie_weights(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The method of transformers, which also resizes the adapters' factors and copies of the embeddings.

        New rows are random and frozen unless input and output embedding are in `modules_to_save`. An adapter for which
        they are frozen is not trained by LoraTrainer and not saved.
        """
        _state(self, "resize_token_embeddings")
        with resizing(self):
            super().resize_token_embeddings(*args, **kwargs)
        return self.get_input_embeddings()


# PreTrainedModel derives this from annotations; it would hide the config class of every base.
if "config_class" in LoraModel.__dict__:
    del LoraModel.config_class


def _state(model: nn.Module, call: str) -> LoraState:
    refuse_inner(model, call)
    return require_state(model, call)


def _first_active(model: nn.Module, call: str) -> str:
    active = _state(model, call).activity.active
    if not active:
        raise StateError(f"{call}: no adapter is active. Pass the name of one.")
    return active[0]
