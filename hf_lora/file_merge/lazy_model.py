"""A model whose weights stay in their files.

The modules are created on the meta device; then their parameters become memory-mapped views of the files. So shapes,
ties, base identity and the checks of loading use the same code as for a loaded model, and only samples of the weights
are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..adapt.walk import module_at
from ..config import as_tuple
from ..errors import AdapterFileError, BaseMismatchError
from ..files.base_config import set_generation, set_settings
from ..files.format import AdapterFile
from ..files.identity import differs
from ..files.load import load_adapter
from ..files.model_class import auto_class, class_in_config, class_in_file, class_named_in
from ..files.renamed import with_present_names
from ..files.vocabulary import holds_new_rows, vocabulary_in
from .naming import Names, names_on_disk
from .ranges import Checkpoint

NAME = "default"


@dataclass
class Shell:
    """A model over files, with the adapter applied.

    Args:
        model: the modules; parameters are views of the files, or on meta if no file has them.
        foreign: whether the class of the model differs from that of the checkpoint, such as a classifier around the
            backbone of a language model: tensors that it does not use are omitted from the result.
        known: the names of all its tensors, without the adapter.
        misshapen: name -> what is wrong with its shape on disk.
        missing: parameters that are in no file and not tied to one that is.
        owners: name in memory -> the name whose tensor on disk it uses; they differ for tied parameters.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    names: Names
    file: AdapterFile
    foreign: bool
    known: tuple[str, ...]
    misshapen: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    owners: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    @property
    def tied(self) -> set[str]:
        """The names of all tensors that are tied to another one."""
        return {*self.ties, *self.ties.values()}


def make_shell(checkpoint: Checkpoint, file: AdapterFile, call: str, allow_other_base: bool) -> Shell:
    """The adapter's model over the files of the base, with all checks of `load_adapter`.

    Raises:
        AdapterFileError: there is no such model, or the files or the adapter do not fit it; lists every fault.
        BaseMismatchError: the adapter was trained on another base.
    """
    config, cls = _class_of(checkpoint.folder, file, call)
    kind = {"model_type": (file.extras.get("base") or {}).get("model_type")}
    if (difference := differs(kind, {"model_type": config.model_type})) and not allow_other_base:
        raise BaseMismatchError(f"{call}: {difference}. Name the base that the adapter was trained on.")
    set_settings(config, file.extras)
    model = _on_meta(cls, config, call)
    file = with_present_names(model, file, call)
    if _fit_vocabulary(model, file, call, allow_other_base):
        model = _on_meta(cls, config, call)
    model = model.to(_main_dtype(config, checkpoint)).eval()
    names = names_on_disk(model, checkpoint.tensors)
    foreign = cls.__name__ not in (config.architectures or [cls.__name__])
    shell = Shell(model, checkpoint, names, file, foreign, tuple(model.state_dict()))
    _fill(shell)
    _tie(shell)
    _set_placeholders(shell)
    set_generation(model, file.extras)
    load_adapter(model, file, NAME, allow_other_base=allow_other_base, call=call)
    return shell


IN_MEMORY = "Load it into memory instead: hf-lora merge ADAPTER --base BASE --out OUT."


def _class_of(folder: Path, file: AdapterFile, call: str) -> tuple[Any, Any]:
    """The base's config, and the model class of the adapter: by name, else by its task."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterFileError(
            f"{call}: transformers cannot load the config of {folder} ({str(error).splitlines()[0]}). Merge a model "
            "with custom code in memory: LoraModel.from_pretrained(…, trust_remote_code=True, merge=True)."
        ) from error
    cls = class_in_file(file) or class_in_config(file, config)
    if cls is None and file.config.task_type is not None:
        cls = as_tuple(auto_class(file)._model_mapping.get(type(config), ()) or (None,))[0]
    cls = cls or class_named_in(config)
    if cls is not None:
        return config, cls
    raise AdapterFileError(
        f"{call}: neither the adapter nor the base's config names a model class of transformers. {IN_MEMORY}"
    )


def _on_meta(cls: Any, config: Any, call: str) -> Any:
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # a class that reads values in its __init__ may raise any exception
        raise AdapterFileError(
            f"{call}: {cls.__name__} could not be created on the meta device ({type(error).__name__}: {error}). "
            f"{IN_MEMORY}"
        ) from error


def _fit_vocabulary(model: PreTrainedModel, file: AdapterFile, call: str, allow_other_base: bool) -> bool:
    """Set the vocabulary size in the config to that of the adapter if it holds the whole embedding.

    Returns:
        whether it was changed, so that the model must be created again.
    """
    text = model.config.get_text_config()
    now = getattr(text, "vocab_size", None)
    saved, whole = vocabulary_in(model, file)
    if saved is None or not isinstance(now, int) or saved == now:
        return False
    if whole is not None:
        text.vocab_size = saved
    elif saved > now and holds_new_rows(model, file):
        raise AdapterFileError(f"{call}: rows for new tokens cannot be merged from file to file. {IN_MEMORY}")
    elif saved > now and not allow_other_base:
        raise BaseMismatchError(
            f"{call}: the adapter was trained with {saved} rows of the token embedding, the base's config has {now}, "
            "and the new rows are in no file. Resize the base as in training and save it, or pass "
            "allow_other_base=True to merge without them."
        )
    return whole is not None


def _main_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype for a head that is in no file: the config's, else the one with the most bytes in the files."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    sizes = Counter[torch.dtype]()
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point and entry.dtype.itemsize > 1:
            sizes[entry.dtype] += entry.end - entry.start
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _fill(shell: Shell) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.model.state_dict().items()}
    for name, key in shell.names.direct.items():
        entry = shell.checkpoint.tensors[key]
        if shapes[name] != entry.shape:
            where = f"{list(entry.shape)} in {entry.file.name}, {list(shapes[name])} in the model"
            shell.misshapen[name] = f"{key} is {where}"
            continue
        path, _, leaf = name.rpartition(".")
        parameters = module_at(shell.model, path)._parameters
        if leaf in parameters:
            mapped: Any = nn.Parameter(shell.checkpoint.mapped(entry), requires_grad=False)
            mapped.look = partial(shell.checkpoint.elements, entry)
            parameters[leaf] = mapped


def _tie(shell: Shell) -> None:
    """Tie parameters as loading does: by the config, unless the files have two different tensors for them."""
    model, names = shell.model, shell.names
    held = names.held
    shell.missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - held
    absent = set(shell.missing)
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in names.direct or source not in names.direct:
            continue
        if _same_values(shell, target, source):
            absent.add(target)
        else:
            del model.all_tied_weights_keys[target]
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    shell.ties = dict(model.all_tied_weights_keys)
    first: dict[int, str] = {}
    everything = dict(model.named_parameters(remove_duplicate=False))
    for name in held & everything.keys():
        if name not in absent:
            first[id(everything[name])] = name
    for name, parameter in everything.items():
        if id(parameter) in first:
            shell.owners[name] = first[id(parameter)]
    shell.missing -= shell.owners.keys()
    computed = model._keys_to_ignore_on_load_missing or ()  # such as tables of positions
    shell.missing = {name for name in shell.missing if not any(re.search(pattern, name) for pattern in computed)}


def _same_values(shell: Shell, one: str, other: str) -> bool:
    a, b = (shell.checkpoint.tensors[shell.names.direct[name]] for name in (one, other))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    one_mapped, other_mapped = (shell.checkpoint.mapped(entry).view(torch.uint8) for entry in (a, b))
    return torch.equal(one_mapped, other_mapped)


def _set_placeholders(shell: Shell) -> None:
    """Set placeholders of the right shape and dtype, expanded from one number, for tensors that no file holds as such.

    These are converted from several tensors or come from the adapter; their values are never read here.
    """
    named = dict(shell.model.named_parameters())
    dtypes = {
        id(named[name]): shell.checkpoint.tensors[next(iter(conversion.collected.values()))[0]].dtype
        for name, conversion in shell.names.converted.items()
        if name in named
    }
    placeholders: dict[int, nn.Parameter] = {}
    for module in shell.model.modules():
        for name, held in module._parameters.items():
            if held is None or not held.is_meta:
                continue
            dtype = dtypes.get(id(held), held.dtype)
            number = torch.full((), math.nan if dtype.is_floating_point else 0, dtype=torch.float32).to(dtype)
            placeholder = nn.Parameter(number.expand(held.shape), requires_grad=False)
            module._parameters[name] = placeholders.setdefault(id(held), placeholder)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
