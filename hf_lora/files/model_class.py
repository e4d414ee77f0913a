"""The class of transformers, or of `hf_lora.pooled`, that an adapter's file is for."""

from __future__ import annotations

from typing import Any

import transformers

from ..adapt.labels import AUTO_CLASSES
from ..compat import is_own_model
from ..pooled.model import class_named
from .format import AdapterFile

_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def class_in_file(file: AdapterFile) -> Any:
    """The class that the adapter was trained on, if the file names one of transformers; else None."""
    mapping = file.raw.get("auto_mapping")
    mapped = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return next(filter(None, map(_class_named, (file.extras.get("architecture"), mapped))), None)


def needs_config(file: AdapterFile) -> bool:
    """Whether `class_in_config` may know better than the auto class of the file's task."""
    return file.config.task_type in _GENERATING


def class_in_config(file: AdapterFile, config: Any) -> Any:
    """The class in the base's own config, for a file whose task is generation, if that class generates; else None.

    Files of other libraries say CAUSAL_LM of every model that generates, such as one that reads images too.
    """
    if not needs_config(file) or getattr(config, "auto_map", None):  # its class is code of its own
        return None
    named = class_named_in(config)
    return named if named is not None and issubclass(named, transformers.GenerationMixin) else None


def class_named_in(config: Any) -> Any:
    """The first class in a config's `architectures`, if it is one of transformers; else None."""
    return _class_named((getattr(config, "architectures", None) or [None])[0])


def auto_class(file: AdapterFile) -> Any:
    """The auto class of the file's task; without a task, that of bodies."""
    return getattr(transformers, AUTO_CLASSES[file.config.task_type or "FEATURE_EXTRACTION"])


def _class_named(name: object) -> Any:
    if isinstance(name, str) and is_own_model(name):
        return getattr(transformers, name)
    return class_named(name)
