"""What hf_lora cannot do to a model, by structural reasons; each refusal must name exactly the modules concerned."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from plain import CONVOLUTIONS, KINDS, attempt
from torch import nn

from hf_lora import LoraError
from hf_lora.adapt.bypass import bypassed_modules, uncalled_embeddings

RANK = 4


def _parametrized(model: Any, name: str, module: Any) -> bool:
    return hasattr(module, "parametrizations")


def _own_forward(model: Any, name: str, module: Any) -> bool:
    """Another forward than its kind's: neither a scaled embedding nor a linear layer that says it otherwise."""
    kind = next(k for k in KINDS if isinstance(module, k))
    if type(module).forward is kind.forward or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return False
    if kind is nn.Linear:
        x = torch.randn(3, module.in_features)
        with torch.no_grad():
            return not torch.allclose(type(module).forward(module, x), nn.Linear.forward(module, x), atol=1e-5)
    return True


def _bypassed(model: Any, name: str, module: Any) -> bool:
    return name in bypassed_modules(model)


def _uncalled(model: Any, name: str, module: Any) -> bool:
    return name in uncalled_embeddings(model)


def indivisible(model: Any, name: str, module: Any) -> bool:
    return isinstance(module, CONVOLUTIONS) and RANK % module.groups != 0


def tied(model: Any, name: str, module: Any) -> bool:
    holders = {id(m) for m in model.modules() if m._parameters.get("weight") is module.weight}
    return len(holders) > 1


def _joined(model: Any, name: str, module: Any) -> bool:
    """One of several embeddings that hold the input embedding's weight: T5 and Bart have three."""
    weight = getattr(attempt(model.get_input_embeddings), "weight", None)
    held = {id(m) for m in model.modules() if isinstance(m, nn.Embedding) and m._parameters.get("weight") is weight}
    return len(held) > 1 and id(module) in held


def _grouped(model: Any, name: str, module: Any) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups > 1


Predicate = Callable[[Any, str, Any], bool]
AT_APPLY: dict[str, tuple[Predicate, str]] = {
    "parametrized weight": (_parametrized, "computed from other tensors (a parametrization)"),
    "forward of its own": (_own_forward, "is not a supported kind of layer"),
    "weight used by the parent": (_bypassed, "multiplies by its weight directly"),
    "embedding that nothing calls": (_uncalled, "nothing calls it"),
    "rank not divisible by groups": (indivisible, "must be divisible by the convolution's"),
}
AT_RESIZE: dict[str, tuple[Predicate, str]] = {
    "embeddings that resizing joins": (_joined, "resizing merges them into one module"),
}
AT_MERGE: dict[str, tuple[Predicate, str]] = {
    "tied weight": (tied, "its weight is tied to"),
    "grouped convolution": (_grouped, "crosses its groups, which a grouped weight cannot represent"),
}


def expected(table: dict[str, tuple[Predicate, str]], model: Any, names: list[str]) -> dict[str, list[str]]:
    """Reason -> names of the modules that the model's structure forbids."""
    modules = dict(model.named_modules())
    found = {key: [n for n in names if applies(model, n, modules[n])] for key, (applies, _) in table.items()}
    return {key: hits for key, hits in found.items() if hits}


def assert_refused(error: LoraError, table: dict[str, tuple[Predicate, str]], refused: dict[str, list[str]]) -> None:
    """The error lists every refused module with its reason, and nothing else."""
    faults = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    wanted = [(name, table[key][1]) for key, names in refused.items() for name in names]
    for fault in faults:
        assert any(fault.startswith(f"{name}: ") and why in fault for name, why in wanted), f"not expected: {fault}"
    distinct = {name for name, _ in wanted}
    more = re.search(r"… and (\d+) more", str(error))
    listed = {fault.split(": ")[0] for fault in faults}
    assert more or listed == distinct, f"not refused: {distinct - listed}"
    assert len(faults) + int(more[1] if more else 0) >= len(distinct)
    assert str(error).splitlines()[-1].strip(), "the error ends with no next step"
