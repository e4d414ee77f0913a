"""A language model with its tokenizer, loaded from an adapter or a full model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import transformers
from transformers import PreTrainedModel

from ..adapt.labels import task_type_of
from ..adapt.state import trained_format
from ..data.trained import TrainedFormat
from ..errors import AdapterFileError, ConfigError, Faults, LoraError, StateError, nearest
from ..export import DTYPES
from ..files.format import CONFIG_NAME, read_config, read_extras
from ..hub.download import FullModelError, local_adapter
from ..hub.names import check_base
from ..load import find_processor
from ..model import LoraModel
from ..pooled.model import class_named

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


class Loading(TypedDict, total=False):
    """The options of `load_for_generation`."""

    base_model: str | os.PathLike[str] | None
    merge: bool
    revision: str | None
    subfolder: str | None
    dtype: str | None
    device: str | None
    token: str | None


def load_for_generation(
    source: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    merge: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    token: str | None = None,
    any_task: bool = False,
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer.

    Args:
        source: an adapter or a full (merged) model: its folder, or its name on the Hub.
        base_model: folder or name of an adapter's base; default: the one that the adapter names.
        merge: fold the adapter into the weights.
        revision: branch, tag or commit of `source`.
        subfolder: folder of an adapter that is not in the root of `source`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; default: the checkpoint's.
        device: such as `"cuda:1"`; default: the accelerator if there is one, else the CPU.
        token: for the Hub.
        any_task: also accept an adapter or a model for another task, such as classification.

    Returns:
        (model, tokenizer). The model is in eval mode: a `LoraModel`, or a plain one if merged. The tokenizer is the
        one saved with the adapter, else the base's; with `any_task`, of a model for images its image processor.

    Raises:
        ConfigError: an argument is invalid.
        AdapterFileError: `source` could not be loaded, or it has no tokenizer.
        StateError: the model does not generate text, such as a classifier.
        VersionError: a package that its tokenizer or image processor needs is not installed.
    """
    call = f"load_for_generation({os.fspath(source)!r})"
    place = _check_arguments(call, dtype, device)
    if isinstance(base_model, str):
        check_base(base_model, None, call)
    try:
        folder = local_adapter(source, revision, token, subfolder=subfolder)
    except FullModelError:
        folder = Path(source)
    if (folder / CONFIG_NAME).is_file():
        model = LoraModel.from_pretrained(folder, base_model=base_model, merge=merge, dtype=dtype, token=token)
        base: Any = base_model or model.config._name_or_path
    else:
        if base_model is not None or merge:
            raise ConfigError(
                f"{call}: this is not an adapter (no {CONFIG_NAME}), so base_model and merge=True do not apply. Omit "
                "them."
            )
        base = source
        model = _load_whole(call, source, folder, revision, dtype, token, any_task)
    if not model.can_generate() and not any_task:
        task = PIPELINES.get(task_type_of(model) or "")
        what = f"a {task} model" if task else f"a {type(model).__name__}"
        use = f'hf_lora.pipeline("{task}", {os.fspath(source)!r})' if task else "its forward"
        raise StateError(f"{call}: this is an adapter of {what}, which does not generate text. Use {use}.")
    kind, auto = ("image processor", "AutoImageProcessor") if _reads_images(model) else ("tokenizer", "AutoTokenizer")
    tokenizer = find_processor(auto, folder, base, needed=True)
    if tokenizer is None:
        raise AdapterFileError(
            f"{call}: there is no {kind} in {folder} or {str(base)!r}. Save the one used in training there: "
            f"{kind.replace(' ', '_')}.save_pretrained(folder)."
        )
    if not getattr(model, "is_quantized", False):  # a quantized one stays on its device
        model.to(place)
    return model.eval(), tokenizer


def _reads_images(model: Any) -> bool:
    return getattr(model, "main_input_name", None) == "pixel_values"


def _check_arguments(call: str, dtype: str | None, device: str | None) -> torch.device:
    faults = Faults(call)
    if dtype is not None and dtype not in DTYPES:
        faults.add(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}; it is one of {', '.join(DTYPES)}")
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device is not None:
        try:
            place = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # unknown names, and backends that PyTorch was built without
            faults.add(f"device={device!r} cannot be used: {str(error).splitlines()[0]}")
    faults.check(ConfigError, "Correct or omit these.")
    return place


def _load_whole(
    call: str,
    source: str | os.PathLike[str],
    folder: Path,
    revision: str | None,
    dtype: str | None,
    token: str | None,
    any_task: bool,
) -> Any:
    """A full model of the class of its checkpoint, if that generates text or with `any_task`.

    Another class would get a random output head.
    """
    if Path(source).is_dir() and not (folder / "config.json").is_file():
        read_config(folder)  # its error names what is there instead
    given = {k: v for k, v in {"revision": revision, "token": token}.items() if v is not None}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **given)
        for name in config.architectures or []:
            cls = getattr(transformers, name, None) or class_named(name)
            if cls is not None and not cls.can_generate():
                if any_task:
                    return cls.from_pretrained(source, **given, **({} if dtype is None else {"dtype": dtype}))
                raise StateError(
                    f"{call}: this is a {name}, which does not generate text. Name a language model or its adapter."
                )
        auto: Any = getattr(
            transformers, "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        )
        return auto.from_pretrained(source, **given, **({} if dtype is None else {"dtype": dtype}))
    except (LoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the Hub, the files' parsers and missing packages raise any exception
        raise AdapterFileError(
            f"{call}: it has no adapter, and no language model could be loaded from it "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). Check the name."
        ) from error


def recorded_format(source: Any, **loading: Unpack[Loading]) -> TrainedFormat | None:
    """The format of the rows that an adapter was trained on, if known, before its base is loaded.

    Args:
        source, loading: as for `loaded`.
    """
    if isinstance(source, PreTrainedModel):
        return trained_format(source)
    try:
        folder = local_adapter(
            source, loading.get("revision"), loading.get("token"), subfolder=loading.get("subfolder")
        )
    except FullModelError:
        return None
    return TrainedFormat.from_json(read_extras(folder).get("training_format"))


def loaded(
    call: str, source: Any, tokenizer: Any, any_task: bool = False, **loading: Unpack[Loading]
) -> tuple[Any, Any]:
    """Like `load_for_generation`, but `source` may also be a model in memory, with `tokenizer`.

    Raises:
        ConfigError: a model in memory without a tokenizer, or with options for loading.
    """
    if not isinstance(source, PreTrainedModel):
        model, own = load_for_generation(source, any_task=any_task, **loading)
        return model, tokenizer or own
    faults = Faults(f"{call}(a {type(source).__name__} in memory)")
    if tokenizer is None:
        faults.add("tokenizer= is missing: pass the one used in training")
    faults.found += [
        f"{name}= is only for a model loaded from a folder or the Hub" for name, value in loading.items() if value
    ]
    faults.check(ConfigError, "Correct these, or pass the folder that the model was saved in.")
    return source, tokenizer
