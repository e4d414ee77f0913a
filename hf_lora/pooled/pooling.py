"""How the hidden states of a text become one vector, as in sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, Faults, nearest

POOLING = "pooling"
"""The field of a config.json and an hf_lora.json."""
MAX_DENSE = 8
MAX_WIDTH = 2**20


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), (positions * mask).argmax(1)]


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(1)]


def _sum(hidden: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """The weighted sum over tokens, divided by [batch, 1], in float32 or more."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.einsum("bth,bt->bh", hidden.to(dtype), weights.to(dtype))
    return total / count.to(dtype)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask, mask.sum(1, keepdim=True).clamp(min=1))


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return _sum(hidden, mask, mask.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype).sqrt())


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return _mean(hidden, mask * mask.cumsum(1))


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask[..., None] == 0, torch.finfo(hidden.dtype).min).amax(1)


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""Name in sentence-transformers -> (hidden states [batch, tokens, width], mask [batch, tokens]) -> [batch, width]."""
SHORT = {"last": "lasttoken"}
"""Other names of modes."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": torch.nn.Identity(),
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
    "SiLU": torch.nn.functional.silu,
    "Sigmoid": torch.sigmoid,
}
"""Name of a class of torch -> its function, for dense layers behind the pooling."""


@dataclass(frozen=True)
class Dense:
    """A dense layer behind the pooling."""

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"


@dataclass(frozen=True)
class Pooling:
    """What a sentence vector is made of.

    Args:
        modes: names of `MODES`; the vectors of several are concatenated.
        dense: layers that follow.
        normalize: whether the vector has length 1 at the end.
    """

    modes: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    normalize: bool = False

    @classmethod
    def of(cls, value: str | Pooling) -> Pooling:
        """The pooling with one mode, by its name.

        Raises:
            ConfigError: there is no such mode.
        """
        if isinstance(value, Pooling):
            return value
        name = SHORT.get(value, value)
        if name not in MODES:
            known = [*MODES, *SHORT, "own"]
            raise ConfigError(f"pooling={value!r} is unknown{nearest(value, known)}; it is one of {', '.join(known)}.")
        return cls((name,))

    def to_json(self) -> dict[str, Any]:
        """The value of `pooling` in a config.json and an hf_lora.json."""
        return {"modes": list(self.modes), "dense": [asdict(d) for d in self.dense], "normalize": self.normalize}

    @classmethod
    def from_json(cls, values: Any) -> Pooling:
        """The reverse of `to_json`.

        Raises:
            ConfigError: the value is not valid; lists every fault.
        """
        faults = Faults("pooling")
        check_pooling(faults, values)
        faults.check(ConfigError, "Correct config.json, or build the model with hf_lora.build_classifier.")
        return cls(tuple(values["modes"]), tuple(Dense(**d) for d in values["dense"]), values["normalize"])

    def vector(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The pooled hidden states, before the dense layers.

        Args:
            hidden: [batch, tokens, width].
            mask: [batch, tokens], 1 for tokens that count; None: all count.

        Returns:
            [batch, width * number of modes].
        """
        if mask is None:
            mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
        return torch.cat([MODES[mode](hidden, mask) for mode in self.modes], -1)

    def width(self, hidden: int) -> int:
        """The width of the sentence vector over hidden states of this width."""
        return self.dense[-1].out_features if self.dense else hidden * len(self.modes)

    def __str__(self) -> str:
        dense = f", {len(self.dense)} dense layer{'s' * (len(self.dense) > 1)}" if self.dense else ""
        return f"{' and '.join(self.modes)}{dense}{', normalized' if self.normalize else ''}"


def check_pooling(faults: Faults, values: Any) -> None:
    """Add a fault for everything in `Pooling.to_json` that is not valid."""
    if not isinstance(values, Mapping) or values.keys() != {"modes", "dense", "normalize"}:
        faults.add(f"{str(values)[:100]!r} must be an object with modes, dense and normalize")
        return
    modes, dense = values["modes"], values["dense"]
    if not (isinstance(modes, list) and 0 < len(modes) <= len(MODES) and all(mode in MODES for mode in modes)):
        faults.add(f"modes={str(modes)[:100]!r} must be a list of {', '.join(MODES)}")
    if not isinstance(dense, list) or len(dense) > MAX_DENSE or not all(map(_is_dense, dense)):
        faults.add(f"dense={str(dense)[:100]!r} must be a list of at most {MAX_DENSE} dense layers")
    if not isinstance(values["normalize"], bool):
        faults.add(f"normalize={str(values['normalize'])[:100]!r} must be true or false")


def _is_dense(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != set(Dense.__dataclass_fields__):
        return False
    sizes = (value["in_features"], value["out_features"])
    return (
        all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MAX_WIDTH for size in sizes)
        and isinstance(value["bias"], bool)
        and value["activation"] in ACTIVATIONS
    )
