"""Load an adapter with its base model. Optionally merge it, or several adapters with weights, and quantize the result.

Adapters are folded into dense weights before quantization, so that the sum is rounded once, as if the merged model
were loaded from disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapt.inner import refuse_inner
from .adapt.merge import MERGED, merge_for_good
from .adapt.mixing import scale_adapter
from .adapt.state import is_over, state_of
from .adapt.undo import all_or_nothing
from .compat import held_load_report
from .data.encode import knows_no_text
from .errors import AdapterFileError, ConfigError, Faults, HubError, LoraError, VersionError
from .files.base_config import describe_settings, set_generation, settings_for
from .files.format import AdapterFile, holds_adapter, read_adapter, read_config
from .files.keys import PREFIX
from .files.load import load_adapter
from .files.model_class import auto_class, class_in_config, class_in_file, needs_config
from .files.renamed import with_present_names
from .files.vocabulary import fit_vocabulary
from .hub.base import commit_in_training
from .hub.download import local_adapter
from .hub.network import is_unanswered, scrub
from .layers.ops import kept_random_states
from .pooled.model import class_named
from .pooled.pooling import POOLING
from .versions import why_missing

logger = logging.get_logger(__name__)

PROCESSORS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "processor": "AutoProcessor",
}
"""Part of a pipeline -> the auto class that loads it."""

MAX_CHAIN = 16
"""How many adapters may be the base of one another."""

AFTERWARDS = ("quantization_config", "device_map", "max_memory", "offload_folder", "offload_buffers")
"""Arguments of `from_pretrained` for format and placement of the weights; they apply after merging."""


def load_lora(
    model_class: Any,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    base_model: Any = None,
    merge: bool = False,
    weights: Sequence[float] | None = None,
    untie: bool = False,
    is_trainable: bool = False,
    adapter_name: str = "default",
    revision: str | None = None,
    base_revision: str | None = None,
    allow_other_base: bool = False,
    token: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: object = None,
    **base_kwargs: Any,
) -> Any:
    """Load an adapter with its base: `LoraModel.from_pretrained`.

    Args:
        model_class: `LoraModel`, which provides the methods of the model.
        adapter: a folder or a repository on the Hub; with `merge=True` also a sequence of them, whose updates are
            summed.
        base_model: a model, or its folder or repository; default: the one that the adapter's config names. The class
            is the one that the adapter was trained on, otherwise that of its task.
        merge: merge the adapter into the weights and return the plain base class. A `quantization_config` then applies
            to the merged weights: the base is loaded dense, merged, and quantized.
        weights: with `merge=True`, a factor for the update of each adapter; default: 1.
        untie: with `merge=True`, first give an adapted layer that shares its weight its own copy.
        is_trainable: make the adapter require gradients.
        adapter_name: name of the adapter in the model.
        revision: branch, tag or commit of the adapter's repository.
        base_revision: the same for the base; default: the commit that the adapter was trained on.
        allow_other_base: load it onto another base model than it was trained on.
        token: access token for the Hub.
        subfolder: subfolder of the adapter in its folder or repository.
        cache_dir: cache folder for files from the Hub, including those of the base.
        local_files_only: use only cached files and no network, as with HF_HUB_OFFLINE.
        dtype: dtype of the base's weights; the adapter stays float32.
        device_map: for `from_pretrained` of the base, or of the merged model if it is quantized.
        **base_kwargs: further arguments of `from_pretrained` of the base.

    Returns:
        A `LoraModel` in eval mode, or with `merge=True` the plain model.

    Raises:
        AdapterFileError: the adapter is broken or does not fit; lists every fault.
        BaseMismatchError: the adapter was trained on another base.
        ConfigError: the arguments contradict each other; lists every fault.
        MergeError: with `merge=True`, a layer cannot be merged.
        HubError: the adapter, or the base at the commit that it was trained on, could not be loaded from the Hub.
    """
    sources, call = sources_of(adapter), f"LoraModel.from_pretrained({adapter!r})"
    kwargs = {"dtype": dtype, "device_map": device_map, "token": token, "cache_dir": cache_dir, **base_kwargs}
    kwargs |= {"local_files_only": local_files_only or None}
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    quantized = merge and "quantization_config" in kwargs
    check_merge_arguments(call, len(sources), weights, merge, base_model, quantized, untie)
    if isinstance(base_model, nn.Module):
        _refuse_for_memory(
            call, {"base_revision": base_revision, "dtype": dtype, "device_map": device_map, **base_kwargs}
        )
    afterwards = {k: kwargs.pop(k) for k in AFTERWARDS if quantized and k in kwargs}
    where: Any = {"subfolder": subfolder, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = [read_adapter(local_adapter(source, revision, token, **where)) for source in sources]
    names = [adapter_name] if len(files) == 1 else [f"{adapter_name}-{i}" for i in range(len(files))]
    with kept_random_states():  # initializing a missing head draws random numbers
        model = base_model
        if not isinstance(base_model, nn.Module):
            model = _load_base(model_class, files, base_model, base_revision, kwargs)
        # The caller's model is all or nothing; a model that was loaded here is discarded after an error.
        with all_or_nothing(model) if model is base_model else nullcontext() as undo:
            for name, weight in zip(names, weights or [1.0] * len(files), strict=True):
                # Removed from the list, so that its tensors are freed once the model has copies.
                file = with_present_names(model, files.pop(0), call)
                fit_vocabulary(model, file, allow_other_base)
                _put(model_class, model, file, name, is_trainable, allow_other_base)
                scale_adapter(model, name, weight, call, file.path)
                del file
            model.train(is_trainable)
            if merge:
                if undo is not None:
                    undo.unless(partial(is_over, model))
                merge_for_good(model, names, untie=untie)
        return requantized(model, afterwards) if afterwards else model


def find_processor(auto: str, folder: Path, base: str | os.PathLike[str] | None, needed: bool = False) -> Any:
    """The tokenizer or processor from an adapter's folder, otherwise from its base; None if there is none.

    Raises:
        VersionError: it is `needed`, and a package that it needs is not installed.
    """
    names = {"AutoTokenizer": ("tokenizer_config.json", "tokenizer.json")}
    wanted = names.get(auto, ("preprocessor_config.json", "processor_config.json"))
    for source in (folder, base):
        if source and Path(source).is_dir() and not any((Path(source) / n).is_file() for n in wanted):
            continue
        try:
            # The adapter's folder is untrusted: code in it is never run.
            found = getattr(transformers, auto).from_pretrained(source, trust_remote_code=False) if source else None
            if found is None or auto != "AutoTokenizer" or not knows_no_text(found):
                return found
        except Exception as error:  # the files' parsers and missing packages raise any exception
            reason = why_missing(error) if isinstance(error, ImportError) else None
            if reason is not None and needed:
                raise VersionError(f"{source}: {auto} could not be loaded: {reason}.") from error
            if reason is not None:
                logger.warning(f"{source}: {auto} could not be loaded: {reason}.")
            elif auto == "AutoTokenizer" and source and Path(source).is_dir():
                text = (str(error).splitlines() or [""])[0]
                logger.warning(f"{source}: {auto} could not read its files ({type(error).__name__}: {text}).")
    return None


def _put(
    model_class: Any, model: Any, file: AdapterFile, name: str, is_trainable: bool, allow_other_base: bool
) -> None:
    """Load onto a model that may have adapters already."""
    first, call = state_of(model) is None, "LoraModel.from_pretrained"
    refuse_inner(model, call)
    load_adapter(model, file, name, is_trainable=is_trainable, allow_other_base=allow_other_base, call=call)
    if first:
        model_class.begin(model)


def _load_base(
    model_class: Any, files: Sequence[AdapterFile], base: Any, revision: str | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    file = files[0]
    name = base or file.config.base_model_name_or_path
    if not name:
        raise AdapterFileError(
            f"LoraModel.from_pretrained({str(file.path)!r}): the adapter's config names no base model. "
            "Pass base_model=…: a model, its folder or its repository."
        )
    if holds_adapter(name):
        return _load_chain(model_class, file, str(name), kwargs)
    use_recorded = revision is None and not os.path.isdir(str(name))  # Path.is_dir raises for a name that is too long
    trained_on = commit_in_training(file.config, file.extras, str(name)) if use_recorded else None
    if revision is not None or trained_on is not None:
        kwargs["revision"] = revision or trained_on
    kwargs.setdefault("trust_remote_code", False)  # only the caller may allow it; transformers would prompt
    with held_load_report() as release:
        try:
            kwargs, own_size = _with_settings(name, file, kwargs)
            model, found = _class_of(file, name, kwargs).from_pretrained(name, output_loading_info=True, **kwargs)
        except (LoraError, torch.OutOfMemoryError):
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            is_file = isinstance(error, OSError)
            if is_file and not is_unanswered(error) and (folder := _on_hub(name, kwargs)) is not None:
                return _load_chain(model_class, file, folder, kwargs)
            call, why = (
                f"LoraModel.from_pretrained({str(file.path)!r})",
                scrub(f"{error}\n".strip().partition("\n")[0]),
            )
            if trained_on is not None and is_file:
                raise HubError(
                    f"{call}: the base {name} at commit {trained_on}, on which the adapter was trained, could not be "
                    f"loaded ({why}). Check network and access, or pass base_revision='main' to use the current base, "
                    "whose weights are compared."
                ) from error
            which = f"the adapter names the base {name!r}, which" if base is None else f"the base {str(name)!r}"
            step = "Pass base_model=…: a model, its folder or its repository."
            if "trust_remote_code" in str(error):
                step = "If you trust its code, pass trust_remote_code=True."
            raise AdapterFileError(f"{call}: {which} could not be loaded ({why}). {step}") from error
        if getattr(model, "_hf_peft_config_loaded", False):  # PEFT is installed, and loaded it with its base
            return _load_chain(model_class, file, str(local_adapter(name)), kwargs)
        if own_size:
            _check_mismatched(file, found["mismatched_keys"])
        missing = [key for key in found["missing_keys"] if not any(f"{PREFIX}{key}" in f.tensors for f in files)]
        if missing or found["unexpected_keys"] or (found["mismatched_keys"] and not own_size):
            release()  # a head in the adapter is not missing; show the report for anything else
    set_generation(model, file.extras)
    return cast(PreTrainedModel, model)


def _on_hub(name: object, kwargs: Mapping[str, Any]) -> str | None:
    """The folder of an adapter on the Hub that is named as a base; None if it is not one."""
    where = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
    try:
        folder = local_adapter(str(name), **where)
    except (HubError, AdapterFileError):
        return None
    return str(folder) if holds_adapter(folder) else None


def _load_chain(model_class: Any, file: AdapterFile, base: str, kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """A base that is an adapter itself: its base with it merged, and so on."""
    call = f"LoraModel.from_pretrained({str(file.path)!r})"
    chain = [base]
    while holds_adapter(inner := read_config(Path(chain[-1])).base_model_name_or_path or ""):
        if inner in chain or len(chain) == MAX_CHAIN:
            raise AdapterFileError(
                f"{call}: the base of {chain[-1]} is the adapter {inner}, and so on without end. Correct "
                "base_model_name_or_path in its adapter_config.json, or pass base_model=…: the folder of a full model."
            )
        chain.append(inner)
    logger.info(f"{file.path}: its base is an adapter, which is merged into its own base: {' -> '.join(chain)}.")
    common = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
    model: PreTrainedModel = load_lora(model_class, chain.pop(), merge=True, **common)
    while chain:
        model.__dict__.pop(MERGED, None)  # what is merged is what the next adapter was trained on
        model = load_lora(model_class, chain.pop(), base_model=model, merge=True)
    model.__dict__.pop(MERGED, None)
    wanted = _class_of(file, model.config._name_or_path, common)
    if hasattr(wanted, "config_class") and not isinstance(model, wanted):
        raise AdapterFileError(
            f"{call}: the adapter is for a {wanted.__name__}, but its base {base} is an adapter of a "
            f"{type(model).__name__}. Merge that one into a folder, and pass it as base_model=FOLDER: hf-lora merge "
            f"{base} --out FOLDER."
        )
    return model


_WHERE = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder", "gguf_file")
"""Arguments of `from_pretrained` that say where a config is."""


def _with_settings(base: Any, file: AdapterFile, kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments for loading the base with the settings of the training, and whether its head has another size.

    What the caller gives is preferred.
    """
    if class_named(file.extras.get("architecture")) is not None:
        kwargs = {**kwargs, POOLING: file.extras.get(POOLING)}
    if not file.extras.get("config") or "config" in kwargs:
        return kwargs, False
    config = transformers.AutoConfig.from_pretrained(base, **{k: kwargs[k] for k in _WHERE if k in kwargs})
    settings = settings_for(config, file.extras)
    logger.info(f"{file.path}: the base is loaded as in training, with {describe_settings(file.extras)}.")
    own_size = "vocab_size" in settings and "vocab_size" not in kwargs and "ignore_mismatched_sizes" not in kwargs
    more = {"ignore_mismatched_sizes": True} if own_size else {}
    return {**settings, **kwargs, **more}, own_size


def _check_mismatched(file: AdapterFile, mismatched: Iterable[Any]) -> None:
    """Check that the adapter brings every tensor that has another size than in the base's files."""
    names = [key[0] if isinstance(key, tuple) else key for key in mismatched]
    lacking = [name for name in names if f"{PREFIX}{name}" not in file.tensors]
    if lacking:
        raise AdapterFileError(
            f"from_pretrained({str(file.path)!r}): with the vocab_size of the training, {', '.join(lacking)} "
            "has another size than in the base's files, and the adapter's file lacks it. Pass the base of the "
            "training as base_model=."
        )


def _class_of(file: AdapterFile, base: Any, kwargs: Mapping[str, Any]) -> Any:
    """The class that the adapter was trained on, if its name is known, otherwise the auto class of its task, or for a
    task that is generation the class in the base's own config."""
    found = class_in_file(file)
    if found is None and needs_config(file):
        config = transformers.AutoConfig.from_pretrained(base, **{k: kwargs[k] for k in _WHERE if k in kwargs})
        found = class_in_config(file, config)
    return found or auto_class(file)


def sources_of(
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[str | os.PathLike[str]]:
    """One adapter, or a sequence of them, as a list."""
    return [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)


def check_merge_arguments(
    call: str,
    count: int,
    weights: Sequence[float] | None,
    merge: bool,
    base_model: object,
    quantized: bool,
    untie: bool,
) -> None:
    """Check the arguments for merging at load.

    Raises:
        ConfigError: lists every fault.
    """
    faults = Faults(call)
    if not count:
        faults.add("no adapter is named")
    if count > 1 and not merge:
        faults.add("several adapters are named, which needs merge=True; load further ones with model.load_adapter")
    if weights is not None:
        if not merge:
            faults.add("weights= needs merge=True")
        given = [weights] if isinstance(weights, (int, float)) else weights
        if len(given) != count:
            faults.add(f"{len(given)} weights are given for {count} adapters")
        if given is not weights:
            faults.add(f"weights={weights!r} must be a list, with one number for each adapter")
        for weight in given:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                faults.add(f"{weight!r} is not a finite number, so it cannot be a weight")
    if untie and not merge:
        faults.add("untie= needs merge=True")
    if merge and quantized and isinstance(base_model, nn.Module):
        faults.add("quantization_config cannot apply to a base_model in memory; pass its folder or repository")
    faults.check(ConfigError, "Nothing was loaded.")


def _refuse_for_memory(call: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments for loading a base, which have no effect on one in memory.

    Raises:
        ConfigError: lists them.
    """
    faults = Faults(call)
    for name, value in given.items():
        if value is not None:
            faults.add(f"{name}={value!r} is for loading the base, but base_model is a model in memory")
    faults.check(ConfigError, "Leave these arguments out, or pass the folder or repository of the base.")


def requantized(model: PreTrainedModel, afterwards: Mapping[str, Any]) -> PreTrainedModel:
    """The model that transformers would load from a dense model's tensors with a `quantization_config`."""
    config, generation = model.config, getattr(model, "generation_config", None)
    made = type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=model.dtype, **afterwards
    )
    if generation is not None:
        made.generation_config = generation
    return made.eval()
