"""Tables and summary lines for users."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..layers.distributed import whole_numel
from ..layers.storages import numel
from .state import require_state
from .walk import adapter_layers, parts


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts with the elements that it represents."""
    trainable = total = 0
    for parameter in model.parameters():
        packed = numel(parameter)
        count = whole_numel(parameter) if packed is None else packed  # ZeRO-3 leaves an empty tensor behind
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def trainable_line(model: nn.Module) -> str:
    """Trainable and all parameters, and the percentage, in the format of PEFT."""
    trainable, total = trainable_parameters(model)
    share = 100 * trainable / max(1, total)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def adapter_table(model: nn.Module, name: str | None = None) -> str:
    """Every adapted layer with shape, rank, alpha and parameters; modules trained whole; skipped modules and why."""
    state = require_state(model, "adapter_table")
    names = [name] if name is not None else list(state.adapters)
    tables = []
    for each in names:
        state.require(each)
        rows = [
            (path, _shape(layer), layer._lora.adapters[each].r, layer._lora.adapters[each].alpha, _count(layer, each))
            for path, layer in adapter_layers(model).items()
            if each in layer._lora.names
        ]
        record = state.adapters[each]
        counts = {p.path: sum(whole_numel(t) for _, t in p.tensors()) for p in parts(model, each) if p.whole_module}
        whole = [(path, why, counts.get(path, 0)) for path, why in record.heads.items()]
        tables.append(f"adapter {each!r}\n" + _table(rows, whole, record.skipped, record.notes))
    return "\n\n".join(tables)


def explanation_table(plan: Any) -> str:
    """The same table for a plan: see `explain_targets`."""
    rows = [(t.name, "{} -> {}".format(*t.shape.features(t.site)), t.r, t.alpha, t.parameters) for t in plan.layers]
    whole = [(path, why, None) for path, why in plan.saved.items()]
    return _table(rows, whole, plan.skipped, plan.notes)


def _table(
    rows: list[tuple[str, str, int, float, int]],
    whole: Sequence[tuple[str, str, int | None]],
    skipped: dict[str, str],
    notes: Iterable[str],
) -> str:
    cells: list[tuple[str, ...]] = [("layer", "shape", "r", "alpha", "parameters")]
    cells += [(n, s, str(r), f"{a:g}", f"{c:,}") for n, s, r, a, c in rows]
    cells.append((f"{len(rows)} layers", "", "", "", f"{sum(row[4] for row in rows):,}"))
    lines = _columns(cells)
    if whole:
        lines += ["trained whole:", *(f"  {n}: {why}" + (f", {c:,} parameters" if c else "") for n, why, c in whole)]
    if skipped:
        lines += ["left out:", *(f"  {n}: {why}" for n, why in skipped.items())]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _columns(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells]  # fmt: skip


def _shape(layer: Any) -> str:
    return "{} -> {}".format(*layer._lora.shape.features(layer))


def _count(layer: Any, name: str) -> int:
    specs = layer._lora.adapters[name].specs
    return sum(whole_numel(factor.weight) for kind, factor in layer.factors(name) if specs[kind].trainable)
