"""LoRA as command-line flags: the dataclasses that `HfArgumentParser` reads from flags, YAML, JSON or a dict.

`HfArgumentParser` supports one type per flag: no `list | str`, no `bool | str`, no dict with typed values. So the
fields have types that it can parse (`list[str]`, a `re:` prefix, JSON text), and `lora_config()` converts them to a
`LoraConfig`.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import logging

from ..adapt.request import check_alphas, check_names
from ..config import OF_INITS, PRESETS, LoraConfig
from ..errors import ConfigError, Faults
from ..layers.methods import METHODS
from .engines import requested_engine, why_not_sharded
from .former_names import accepts_former_names
from .optimizer import FIELDS
from .shared_flags import leave_out_shared_flags

logger = logging.get_logger(__name__)
REGEX = "re:"
LOWER_IS_BETTER = ("perplexity", "mean_perplexity", "wer", "cer", "ter", "mse", "mae", "rmse")
"""Metrics whose best value is the lowest, as `metric_for_best_model`."""
_INIT = {"true": True, "false": False}
_OF_NAMES = ("init_lora_weights", "method", "alora_invocation_tokens", *OF_INITS)
"""The fields with names of methods and initializations, and what these need."""
_IN_CONFIG = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_init": "init_lora_weights"}
"""The names in LoraConfig; other fields have the same name without the prefix lora_."""


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field for `HfArgumentParser`, with its default and help text."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoraArguments:
    """Only the LoRA fields, for a script that parses them along with its own dataclasses.

    `LoraTrainingArguments` has the same fields and Trainer's. Under a parser of several classes, a flag that another
    class defines too is that class's, as with TRL's `ModelConfig`.

    Raises:
        ConfigError: lists every field that cannot be parsed or has an invalid value.
    """

    parsed_elsewhere: ClassVar[tuple[str, ...]] = ()
    """The fields whose flags another class of the parser defines."""

    lora_r: int = flag(8, "Rank of every adapted layer.")
    lora_alpha: float | None = flag(None, "The update is scaled by alpha / r. Default: 2 r.")
    lora_dropout: float = flag(0.0, "Dropout of the adapter's input in training; >= 0 and < 1.")
    lora_target_modules: list[str] = flag(
        ["all-linear"],
        "Names or suffixes of the modules to adapt, or one of: all-linear (every linear layer except the output "
        "head), attention, re:PATTERN (a regular expression that matches full names).",
    )
    lora_exclude_modules: list[str] | None = flag(None, "Names or suffixes of modules to exclude, or one re:PATTERN.")
    lora_layers_to_transform: list[int] | None = flag(None, "Indices of the layers to adapt. Default: all.")
    lora_layers_pattern: list[str] | None = flag(
        None, "Names of the module lists that lora_layers_to_transform indexes, such as layers."
    )
    lora_rank_pattern: dict[str, Any] | str | None = flag(
        None, 'Ranks for single modules, as JSON: {"name or pattern": 16}.'
    )
    lora_alpha_pattern: dict[str, Any] | str | None = flag(
        None, 'Alphas for single modules, as JSON: {"name or pattern": 32}.'
    )
    lora_use_rslora: bool = flag(False, "Scale by alpha / sqrt(r) instead of alpha / r.")
    lora_use_dora: bool = flag(False, "DoRA: a trained magnitude for each output; the same as --lora_method dora.")
    lora_method: str = flag(
        "lora",
        "How the factors change a layer: lora, dora, lora_bias, lora_fa, lora_grouped or alora.",
        choices=list(METHODS),
    )
    lora_alora_invocation_tokens: list[int] | None = flag(
        None, "aLoRA: the adapter acts from the last occurrence of these tokens on; the same as --lora_method alora."
    )
    lora_bias: Literal["none", "all", "lora_only"] = flag(
        "none", "Biases to train: none, those of the adapted layers (lora_only), or all."
    )
    lora_modules_to_save: list[str] | None = flag(
        None,
        "Modules to train whole and save with the adapter; none: no module. Default: a task head that the base "
        "checkpoint did not have.",
    )
    lora_trainable_token_indices: list[int] | None = flag(
        None, "Tokens whose rows of the input embedding are trained and saved, such as all added ones."
    )
    lora_train_new_tokens: bool = flag(
        False, "If the tokenizer has tokens that the base lacks: resize the vocabulary, and train and save their rows."
    )
    lora_init: str = flag(
        "true",
        "true: A Kaiming-uniform, B zero. gaussian: A normal, B zero. false: also B random (for tests). Others: "
        "orthogonal, pissa, pissa_niter_4 (4 iterations of a fast approximation), olora, loftq, mica; of training "
        "batches: eva, corda, lora_ga.",
    )
    lora_init_config: dict[str, Any] | str | None = flag(
        None, 'Settings of the initialization, as JSON: {"rho": 1.5} for eva. See docs/methods.md.'
    )
    lora_init_batches: int = flag(64, "How many training batches eva, corda and lora_ga look at, at most.")
    lora_task_type: str | None = flag(None, "PEFT's task type for the saved config, such as CAUSAL_LM or SEQ_CLS.")
    lora_adapter: str | None = flag(
        None, "Folder or Hub name of an adapter to continue training, or to evaluate; the model is its base."
    )
    lora_allow_bypassed: bool = flag(
        False, "Adapt named modules even if their parent uses their weight without calling them."
    )
    loraplus_lr_ratio: float | None = flag(
        None, "LoRA+ (Hayou et al. 2024): ratio of the learning rate of B to that of A (learning_rate). Default: 1."
    )
    head_learning_rate: float | None = flag(
        None, "Learning rate of modules trained whole, such as heads. Default: learning_rate."
    )
    muon_learning_rate: float | None = flag(
        None,
        "Train the factors of linear layers with LoRA-Muon (Cesista et al. 2026) and this rate, such as 0.01: the "
        "spectral norm of what a step adds to a weight. learning_rate is then for everything else. Default: AdamW.",
    )
    ema: float = flag(
        0.0,
        "Decay of an exponential moving average of all trained weights, such as 0.99, which is evaluated and saved in "
        "their place; 0: off.",
    )
    frozen_head_loss: bool = flag(
        True,
        "Compute the loss of a causal language model with a frozen head without storing the logits, if the model "
        "allows it.",
    )
    share_inputs: bool = flag(
        True,
        "Compute layers with the same input (query, key and value) together. They are detected on the first batch.",
    )
    keep_freed_memory: bool = flag(False, "No effect; kept for files and scripts that set it.")
    accept_ddp_fallback: bool = flag(
        False,
        "Train even if FSDP or DeepSpeed was requested but Accelerate runs another engine, as on a CPU: every process "
        "then holds the whole model.",
    )
    lora_guard_steps: int = flag(
        4, "Number of optimizer steps in which to check that every adapted layer is trained; 0: no check."
    )

    nonfinite: Literal["stop", "skip"] = flag(
        "stop",
        "What to do if a loss or gradient is not finite, before the optimizer step. stop: an error with the step and "
        "the tensors. skip: skip the step and count it.",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        leave_out_shared_flags(HfArgumentParser, LoraArguments)
        trl: Any = sys.modules.get("trl")
        if trl is not None:  # its parser is another class
            leave_out_shared_flags(trl.TrlParser, LoraArguments)

    def __post_init__(self) -> None:
        self.lora_init = str(self.lora_init).lower()  # YAML reads true as a bool
        metric, greater = (getattr(self, n, None) for n in ("metric_for_best_model", "greater_is_better"))
        if greater is None and str(metric).removeprefix("eval_") in LOWER_IS_BETTER:
            vars(self)["greater_is_better"] = False  # Trainer knows it only of names that end with "loss"
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
        self.lora_config()
        if self.keep_freed_memory:
            logger.warning_once(
                "keep_freed_memory no longer has any effect; use environment variables of the C library instead: "
                "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=9223372036854775807 (glibc)."
            )

    @classmethod
    def of(cls, arguments: TrainingArguments, **more: Any) -> Self:
        """The same arguments as those of another Trainer.

        Args:
            more: further fields, or other values.
        """
        known = {f.name for f in fields(cls) if f.init}
        given = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name in known}
        return cls(**{**given, **more})

    def lora_config(self) -> LoraConfig:
        """The `LoraConfig` that the fields describe.

        Raises:
            ConfigError: lists every field that cannot be parsed or has an invalid value.
        """
        faults = Faults(f"{type(self).__name__}(…)")
        values = {_IN_CONFIG.get(name, name.removeprefix("lora_")): getattr(self, name) for name in _config_fields()}
        for name in ("target_modules", "exclude_modules"):
            values[name] = _names_or_regex(faults, f"lora_{name}", values[name])
        for name in ("rank_pattern", "alpha_pattern"):
            values[name] = _table(faults, f"lora_{name}", values[name])
        values["modules_to_save"] = _names(values["modules_to_save"])
        if values["modules_to_save"] == ["none"]:
            values["modules_to_save"] = []
        values["init_lora_weights"] = _INIT.get(self.lora_init, self.lora_init)
        values |= self._init_settings(faults)
        for name in FIELDS:
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                faults.add(f"{name}={rate!r} must be > 0")
        if self.muon_learning_rate is not None and self.loraplus_lr_ratio is not None:
            faults.add("loraplus_lr_ratio is for AdamW, but muon_learning_rate trains the factors with LoRA-Muon")
        if not 0 <= self.ema < 1:
            faults.add(f"ema={self.ema!r} must be >= 0 and < 1 (0: off)")
        if (engine := requested_engine(self)) and not self.accept_ddp_fallback:
            for fault in why_not_sharded(self, f"{engine[0]}, requested by {engine[1]},"):
                faults.add(fault)
        if self.nonfinite not in ("stop", "skip"):
            faults.add(f"nonfinite={self.nonfinite!r} must be 'stop' or 'skip'")
        unknown = Faults("")
        named = {name: values[name] for name in _OF_NAMES if name in values}
        with contextlib.suppress(ConfigError):  # which the whole configuration raises too
            check_names(LoraConfig(**named), unknown)
        faults.found += [_as_flag(fault) for fault in unknown.found]
        if self.lora_init_batches < 1:
            faults.add(f"lora_init_batches={self.lora_init_batches!r} must be an integer >= 1")
        if self.lora_guard_steps < 0:
            faults.add(f"lora_guard_steps={self.lora_guard_steps!r} must be an integer >= 0 (0: off)")
        config = None
        try:
            config = LoraConfig(**values)
            alphas = Faults("")
            check_alphas(config, alphas)
            faults.found += [_as_flag(fault) for fault in alphas.found]
        except ConfigError as error:
            faults.found += [_as_flag(fault) for fault in error.faults]
        faults.check(ConfigError, "Correct these fields; they are LoraConfig's fields with the prefix lora_.")
        assert config is not None
        return config

    def _init_settings(self, faults: Faults) -> dict[str, Any]:
        """The settings of the initialization, in the field of LoraConfig that is named after it."""
        settings = _table(faults, "lora_init_config", self.lora_init_config)
        if settings and f"{self.lora_init}_config" not in OF_INITS:
            faults.add(f"lora_init_config: the initialization {self.lora_init!r} has no settings")
            return {}
        return {f"{self.lora_init}_config": settings} if settings else {}

    def changed_lora_fields(self) -> list[str]:
        """The names of the fields that define the adapter and differ from their defaults."""
        default = LoraArguments()
        return [
            name
            for name in (*_config_fields(), "lora_allow_bypassed")
            if getattr(self, name) != getattr(default, name)
        ]


def _config_fields() -> list[str]:
    """The names of the fields that LoraConfig also has."""
    other = ("lora_adapter", "lora_allow_bypassed", "lora_guard_steps", "lora_init_config", "lora_init_batches",
             "lora_train_new_tokens")  # fmt: skip
    return [f.name for f in fields(LoraArguments) if f.name.startswith("lora_") and f.name not in other]


@accepts_former_names
@dataclass
class LoraTrainingArguments(LoraArguments, TrainingArguments):
    """A drop-in replacement for `transformers.TrainingArguments` with the LoRA fields.

    Every field of `TrainingArguments` keeps its name, default and position. The fields of `LoraArguments` are added as
    flags `--lora_r`, `--lora_target_modules query value`, `--loraplus_lr_ratio`, …

    Names that transformers 5 renamed or removed, such as `evaluation_strategy`, are translated with a warning.

    Raises:
        ConfigError: lists every LoRA field with an invalid value.
    """


@accepts_former_names
@dataclass
class LoraSeq2SeqTrainingArguments(LoraArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the LoRA fields; see `LoraTrainingArguments`."""


@dataclass
class TrlArguments(LoraArguments):
    """`LoraArguments` for the configs of TRL, in which bfloat16 is on by default; here only with an accelerator."""

    def __post_init__(self) -> None:
        if vars(self)["bf16"] is None and not torch.accelerator.is_available():  # a field of TRL's class
            vars(self)["bf16"] = False
        super().__post_init__()


def _as_flag(fault: str) -> str:
    """A fault of a LoraConfig field, with the name of the flag."""
    name = re.match(r"\w+", fault)
    is_field = name is not None and name[0] in (f.name for f in fields(LoraConfig))
    fault = fault.replace("init_lora_weights", "init", 1)
    return f"lora_{fault}" if is_field and not fault.startswith("lora_") else fault


def _names(value: list[str] | str | None) -> list[str] | None:
    """A list of names. YAML may have a single name, and flags may be separated by commas or spaces."""
    if value is None:
        return None
    items = [value] if isinstance(value, str) else list(value)
    return [name.strip() for item in items for name in str(item).split(",") if name.strip()]


def _names_or_regex(faults: Faults, name: str, value: list[str] | str | None) -> str | list[str] | None:
    items = [value] if isinstance(value, str) else list(value or [])
    if any(str(item).startswith(REGEX) for item in items):
        if len(items) > 1:
            faults.add(f"{name}={items!r}: a {REGEX} pattern must be the only item; put the names in the pattern")
        return str(items[0]).removeprefix(REGEX)
    names = _names(value)
    presets = [item for item in names or [] if item in PRESETS]
    if presets and names != presets[:1]:
        faults.add(f"{name}={names!r}: {presets[0]!r} must be the only item")
    return presets[0] if presets else names


def _table(faults: Faults, name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            faults.add(f"{name}={value!r:.200} is not JSON ({error})")
            return {}
    if value is not None and not isinstance(value, Mapping):
        faults.add(f"{name}={value!r} must map names to numbers")
        return {}
    return dict(value or {})
