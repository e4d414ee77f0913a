"""`LoraConfig`: what to adapt and how, with the field names and the file format of PEFT."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError, Faults, nearest
from .foreign_fields import OTHER_TYPES, accepts_fields_of_peft, check_foreign

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
ATTENTION = "attention"
PRESETS = (ALL_LINEAR, ATTENTION)
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

MAX_NUMBER = 1e9
"""Upper bound of alpha; beyond it float32 updates are noise or infinite."""

IN_PEFT: dict[str, dict[str, bool]] = {
    "lora": {}, "lora_fa": {}, "lora_grouped": {}, "alora": {}, "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}  # fmt: skip
"""Method -> the fields with which PEFT's configuration asks for it; other methods do not exist in PEFT."""
PLAIN_IN_FILES = ("lora_fa", "lora_grouped")
"""Methods that are plain LoRA in PEFT's files; hf_lora.json has their name."""
OF_INITS = ("eva_config", "corda_config", "lora_ga_config")
"""Fields with the settings of one initialization, the one that they are named after."""
_LEFT_OUT = (
    "parts", "trainable_token_indices", "ensure_weight_tying", "use_dora", "lora_bias", "alora_invocation_tokens",
    *OF_INITS,
)  # fmt: skip
"""Fields that files lack if they are empty, as before they existed."""


@accepts_fields_of_peft
@dataclass
class LoraConfig:
    """How LoRA is applied to a model (Hu et al. 2021, arXiv:2106.09685: W' = W + scaling · B A).

    Args:
        r: rank R of every adapted layer.
        lora_alpha: scaling = lora_alpha / r; default: 2 r.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input, in training only.
        target_modules: names or suffixes of modules, one regular expression (matched against the whole name),
            `"all-linear"` (every linear layer except the output head) or `"attention"` (linear layers of attention).
        exclude_modules: names, suffixes or one regular expression of modules to skip.
        layers_to_transform: index or indices of the layers to adapt (with a list or a preset as `target_modules`).
        layers_pattern: name(s) of the module list that the indices refer to, such as `"layers"` or `"h"`.
        rank_pattern: name, suffix or regular expression of a module -> its rank.
        alpha_pattern: the same for alpha.
        use_rslora: scaling = lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        bias: `"none"`, `"lora_only"` (biases of the adapted layers are trained) or `"all"`.
        modules_to_save: modules to train whole and save with the adapter. `None` finds a task head that the base
            checkpoint lacks; `[]` means none.
        init_lora_weights: `True` (A Kaiming-uniform, B zero), `"gaussian"` (A normal with standard deviation 1/r, B
            zero), `False` (B random too, so that the model changes at once; for tests), or the name of a registered
            initialization. Names are looked up when the configuration is applied.
        eva_config: settings of the initialization `"eva"` (docs/methods.md), as a mapping or PEFT's class.
        corda_config: the same for `"corda"`.
        lora_ga_config: the same for `"lora_ga"`.
        fan_in_fan_out: only for the file format; the layer itself shows whether its weight is stored transposed.
        task_type: PEFT's name of the task, such as `"CAUSAL_LM"` or `"SEQ_CLS"`.
        base_model_name_or_path: folder or Hub name of the base model.
        revision: the base model's revision.
        trainable_token_indices: tokens whose rows of the input embedding are trained and saved, such as added ones; or
            name or suffix of a module -> tokens. Modules that share its weight use the same rows.
        use_dora: the method `"dora"`: a trained magnitude for each output (Liu et al. 2024, arXiv:2402.09353).
        lora_bias: the method `"lora_bias"`: the second factor has a bias.
        alora_invocation_tokens: the method `"alora"`: in each row, the adapter acts from the last occurrence of these
            tokens on.
        method: `"lora"`, `"dora"`, `"lora_bias"`, `"lora_fa"`, `"lora_grouped"`, `"alora"` (docs/methods.md), or one
            of another package (docs/extending.md). Files contain the name only of methods that PEFT does not have.
        parts: kind of part that another package registered -> JSON values for that kind. Files contain it only if it
            is not empty.
        ensure_weight_tying: train tied embeddings whole with one weight; factors and other tokens of one are refused.

    Raises:
        ConfigError: lists every field with a wrong value.
    """

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    alora_invocation_tokens: list[int] | None = None
    method: str = "lora"
    parts: dict[str, Any] = field(default_factory=dict)
    ensure_weight_tying: bool | None = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        self.parts = {} if self.parts is None else self.parts
        faults = Faults("LoraConfig(…)")
        self._settle_inits(faults)
        self._resolve_method(faults)
        self._check(faults)
        faults.check(ConfigError, "Correct these fields; the docstring of LoraConfig describes them.")

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or 2 r if it is None."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    def scaling(self, r: int, alpha: float) -> float:
        """The scaling of B A for the rank and alpha of one layer."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def _settle_inits(self, faults: Faults) -> None:
        """Make the settings of the initialization a mapping, and remove those of others, which have no effect."""
        for name in OF_INITS:
            value = getattr(self, name)
            value = vars(value) if dataclasses.is_dataclass(value) else value
            if not str(self.init_lora_weights).startswith(name.removesuffix("_config")):
                value = None
            elif not isinstance(value, Mapping | None):
                faults.add(f"{name}={value!r:.200} must be a mapping of settings")
            setattr(self, name, dict(value) if isinstance(value, Mapping) else value)

    def _resolve_method(self, faults: Faults) -> None:
        """Make `method` and the fields that PEFT has instead agree."""
        if not isinstance(self.method, str):
            faults.add(f"method={self.method!r} must be a name, such as 'lora'")
        asked = [str(self.method)]
        for name, fields in IN_PEFT.items():
            for each in fields:
                value = getattr(self, each) or False
                setattr(self, each, value or name == self.method)
                if not isinstance(value, bool):
                    faults.add(f"{each}={value!r} must be True or False")
                elif value:
                    asked.append(name)
        tokens = self.alora_invocation_tokens = self.alora_invocation_tokens or None
        if tokens is not None:
            asked.append("alora")
        if (tokens is not None or self.method == "alora") and not _is_list_of(tokens, int):
            faults.add(f"alora_invocation_tokens={tokens!r:.200} must be a list of tokens")
        wanted = [name for name in dict.fromkeys(asked) if name != "lora"]
        if len(wanted) > 1:
            faults.add(f"the fields ask for {', '.join(wanted)}, but a layer has one method")
        elif wanted:
            self.method = wanted[0]

    def _check(self, faults: Faults) -> None:
        if not _is_int(self.r) or not 1 <= self.r < MAX_NUMBER / 2:
            faults.add(f"r={self.r!r} must be an integer from 1 to {MAX_NUMBER / 2:.0f}")
        if self.lora_alpha is not None and not _is_number(self.lora_alpha):
            faults.add(f"lora_alpha={self.lora_alpha!r} must be a number, or None for 2 r")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            faults.add(f"lora_dropout={self.lora_dropout!r} must be >= 0 and < 1")
        for name, optional in (("target_modules", False), ("exclude_modules", True)):
            value = getattr(self, name)
            if isinstance(value, str):
                if value not in PRESETS:
                    _check_regex(faults, name, value)
            elif not (value is None and optional) and not _is_list_of(value, str):
                faults.add(f"{name}={value!r} must be a list of names or one regular expression")
        if self.target_modules == []:
            faults.add("target_modules=[] adapts nothing")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                _check_regex(faults, name, key)
                is_rank = name == "rank_pattern"
                if not (_is_int(value) and value > 0 if is_rank else _is_number(value)):
                    faults.add(f"{name}[{key!r}]={value!r} must be a {'positive integer' if is_rank else 'number'}")
        if self.bias not in ("none", "all", "lora_only"):
            faults.add(f"bias={self.bias!r} must be 'none', 'all' or 'lora_only'")
        if not isinstance(self.init_lora_weights, (bool, str)):
            faults.add(f"init_lora_weights={self.init_lora_weights!r} must be True, False or a name")
        if not isinstance(self.ensure_weight_tying, bool | None):
            faults.add(f"ensure_weight_tying={self.ensure_weight_tying!r} must be True or False")
        if not isinstance(self.parts, Mapping) or not all(isinstance(kind, str) for kind in self.parts):
            faults.add(f"parts={self.parts!r} must be a mapping from kinds of parts to their values")
        if self.modules_to_save is not None and not _is_list_of(self.modules_to_save, str):
            faults.add(f"modules_to_save={self.modules_to_save!r} must be a list of names, [] for none, or None")
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
        if not all(_is_list_of(each, int) for each in lists):
            faults.add(f"trainable_token_indices={tokens!r:.200} must be a list of tokens, or lists by name")
        indices = self.layers_to_transform
        if indices is not None and not (_is_int(indices) or _is_list_of(indices, int)):
            faults.add(f"layers_to_transform={indices!r} must be one index or a list of them")
        if indices is not None and isinstance(self.target_modules, str) and self.target_modules not in PRESETS:
            faults.add("layers_to_transform cannot be used with a regular expression as target_modules")
        if self.layers_pattern and indices is None:
            faults.add("layers_pattern needs layers_to_transform")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            faults.add(f"task_type={self.task_type!r} is unknown{nearest(self.task_type, TASK_TYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json: plain JSON values, with `lora_alpha` resolved."""
        values = dataclasses.asdict(self)
        values["lora_alpha"] = self.alpha
        if self.method in IN_PEFT:  # PEFT does not know this field
            del values["method"]
        for name in _LEFT_OUT:
            if not values[name]:
                del values[name]
        return {
            "peft_type": _peft_type(self.method, self.parts),
            "inference_mode": True,
            "auto_mapping": None,
            **values,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], call: str = "LoraConfig.from_dict(…)") -> LoraConfig:
        """Read an adapter_config.json.

        Raises:
            ConfigError: a field has a wrong value, or an unsupported field is not at its default.
        """
        faults = Faults(call)
        own = {f.name for f in dataclasses.fields(cls)}
        kind = values.get("peft_type", "LORA")
        kind = str(getattr(kind, "value", kind)).upper()
        if kind not in ("LORA", _peft_type(values.get("method"), values.get("parts") or ())):
            faults.add(f"peft_type={kind!r}: {OTHER_TYPES.get(kind, 'only LORA adapters are supported')}")
        for name, value in values.items():
            if name not in own and name != "peft_type":
                check_foreign(name, value, own, faults)
        taken = {name: value for name, value in values.items() if name in own}
        if taken.get("target_modules", ...) is None:
            faults.add("target_modules=None: the adapter's layers must be named")
            del taken["target_modules"]
        if taken.get("init_lora_weights", ...) is None:
            taken["init_lora_weights"] = False  # in PEFT, both leave the factors as PyTorch creates them
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(taken.get(name) or {}, Mapping):
                faults.add(f"{name}={taken.pop(name)!r} must be a mapping from a pattern to a number")
        config = None
        try:
            config = cls(**{**{"lora_alpha": 8}, **taken})
        except ConfigError as error:
            faults.include(error)
        faults.check(
            ConfigError,
            "Correct wrong values. A field that is not supported changes what the adapter computes, so do not remove "
            "it: load the adapter with the library that wrote it, or use that library to convert it to plain LoRA.",
        )
        assert config is not None
        return config

    @classmethod
    def from_any(cls, config: object) -> LoraConfig:
        """A `LoraConfig` from a `LoraConfig` (copied), a mapping, a `peft.LoraConfig`, or None for the defaults."""
        if config is None:
            return cls()
        if isinstance(config, cls):
            return dataclasses.replace(config)
        if isinstance(config, Mapping):
            # Without peft_type it is in this library's form, where a missing lora_alpha means 2 r, not PEFT's default.
            own = {} if "peft_type" in config else {"lora_alpha": None}
            return cls.from_dict({**own, **config}, call="LoraConfig.from_any(…)")
        if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
            values = dict(config.to_dict())
            if values.get("target_modules", ...) is None:
                values["target_modules"] = ALL_LINEAR
                logger.warning(
                    "target_modules=None: all linear layers but the output layer are adapted. PEFT has a table of "
                    "defaults with fewer layers of known models; name them in target_modules to adapt those."
                )
            return cls.from_dict(values, call=f"{type(config).__module__}.{type(config).__name__}")
        raise ConfigError(
            f"Expected a LoRA config, not {type(config).__name__}. Pass hf_lora.LoraConfig(…), a mapping with its "
            "fields, or a peft.LoraConfig."
        )


def _peft_type(method: object, parts: Iterable[object]) -> str:
    """The `peft_type` in files. PEFT refuses unknown types, instead of ignoring a method or part that it lacks."""
    others = [name for name in (method, *sorted(map(str, parts))) if name is not None and name not in IN_PEFT]
    return "_".join(["LORA", *map(str, others)]).upper()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _check_regex(faults: Faults, name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        faults.add(f"{name}: {pattern!r} is not a regular expression ({error})")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One item or an iterable of items, as a tuple; a string is one item."""
    return (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
