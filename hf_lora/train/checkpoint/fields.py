"""The facts of a run in a checkpoint's manifest, which must match when a run resumes.

Without this check, a difference would go unnoticed or fail late. A new field is one entry of `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...adapt.inject import drop_layers
from ...adapt.state import require_state
from ...compat import zero_partitions
from ...errors import AdapterFileError
from ..average import FIELD, Average
from ..watch.guard import NEVER_CALLED, layers_left_out

FIRST_RUN = "Resume with the arguments of the first run, or start a new run from the adapter alone."


@dataclass
class Run:
    """The state of a run that the fields describe.

    Args:
        model: without Accelerate's wrappers.
        optimizer: None before it is created.
        groups: the parameter groups that it was created with, under DeepSpeed; see `engines.groups_of`.
        quantization: the quantization formats of the base's layers, before an engine shards them.
        average: of the trained weights; empty without one.
    """

    model: nn.Module
    optimizer: Any
    groups: list[dict[str, Any]]
    quantization: list[str]
    average: Average


class Field(NamedTuple):
    """One entry of the manifest.

    Args:
        save: returns the value for the manifest, as JSON; it may also write a file to the checkpoint's folder.
        resume: given the folder and the saved value, raises if the run differs, or restores the saved state.
        of_optimizer: whether it is about the optimizer's state, and so is checked only when that is loaded.
    """

    save: Callable[[Path, Run], object]
    resume: Callable[[Path, Any, Run], None]
    of_optimizer: bool


def resume_fields(folder: Path, manifest: Mapping[str, Any], run: Run, of_optimizer: bool) -> None:
    """Call `resume` of every saved field; checkpoints of an older release or of a plain Trainer lack some.

    Raises:
        AdapterFileError: the run differs from the saved one; names the difference.
    """
    for name, field in FIELDS.items():
        if field.of_optimizer == of_optimizer and manifest.get(name) is not None:
            field.resume(folder, manifest[name], run)


def _parameters(run: Run) -> list[str] | None:
    """Names of the trained parameters in the optimizer's order; None if they are not available."""
    names = {id(p): n for n, p in run.model.named_parameters()}
    groups = run.groups or getattr(run.optimizer, "param_groups", [])
    ordered = [names.get(id(p)) for group in groups for p in group["params"]]
    return None if None in ordered else [n for n in ordered if n is not None]


def _same_parameters(folder: Path, saved: list[str], run: Run) -> None:
    names = _parameters(run)
    if names is None or saved == names:
        return
    lines = [f"The optimizer state in {folder} belongs to other parameters than those trained now:"]
    lines += [f"  - saved but not trained now: {name}" for name in saved if name not in set(names)][:10]
    lines += [f"  - trained now but not saved: {name}" for name in names if name not in set(saved)][:10]
    if len(lines) == 1:
        lines.append("  - the order differs (it depends on the learning rates and the order of the adapters)")
    raise AdapterFileError("\n".join([*lines, FIRST_RUN]))


def _groups(run: Run) -> list[int]:
    """Sizes of the optimizer's parameter groups; engines drop empty ones."""
    groups = run.groups or getattr(run.optimizer, "param_groups", [])
    return [len(group["params"]) for group in groups if group["params"]]


def _same_groups(folder: Path, saved: list[int], run: Run) -> None:
    found = _groups(run)
    if found and saved != found:
        raise AdapterFileError(
            f"The optimizer state in {folder} has parameter groups of {saved} tensors, and this run's has {found}: "
            f"they depend on loraplus_lr_ratio, head_learning_rate, muon_learning_rate and weight decay. {FIRST_RUN}"
        )


def _optimizer(run: Run) -> str | None:
    """Library and class of the optimizer, such as torch.AdamW; None under DeepSpeed, which has its own classes."""
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    if inner is None or zero_partitions(inner) is not None:
        return None
    return f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}"


def _same_optimizer(folder: Path, saved: str, run: Run) -> None:
    found = _optimizer(run)
    if found is not None and saved != found:
        raise AdapterFileError(
            f"The optimizer state in {folder} is from {saved}, but this run's optimizer is {found}. {FIRST_RUN}"
        )


def _same_quantization(folder: Path, saved: list[str], run: Run) -> None:
    if saved != run.quantization:
        was, now = (", ".join(formats) or "not quantized" for formats in (saved, run.quantization))
        raise AdapterFileError(
            f"{folder} was trained on a base with another quantization: then {was}, now {now}. To resume, load the "
            "base as before; or start a new run from the adapter alone: LoraModel.from_pretrained(checkpoint, "
            "base_model=…, is_trainable=True)."
        )


def _left_out(folder: Path, run: Run) -> dict[str, list[str]]:
    """Adapter -> layers that the guard removed it from; it must also be removed from them in a resumed model."""
    records = require_state(run.model, "save_model").adapters
    found = {name: layers_left_out(record) for name, record in records.items()}
    return {name: paths for name, paths in found.items() if paths}


def _leave_out(folder: Path, saved: dict[str, list[str]], run: Run) -> None:
    for name, paths in saved.items():
        drop_layers(run.model, name, set(paths), NEVER_CALLED)


FIELDS: dict[str, Field] = {
    "parameters": Field(lambda folder, run: _parameters(run), _same_parameters, of_optimizer=True),
    "groups": Field(lambda folder, run: _groups(run), _same_groups, of_optimizer=True),
    "quantization": Field(lambda folder, run: run.quantization, _same_quantization, of_optimizer=False),
    "left_out": Field(_left_out, _leave_out, of_optimizer=False),
    "optimizer": Field(lambda folder, run: _optimizer(run), _same_optimizer, of_optimizer=True),
    FIELD: Field(
        lambda folder, run: run.average.save(folder),
        lambda folder, saved, run: run.average.check(folder, saved),
        of_optimizer=False,
    ),
}
"""Name in the manifest -> the field."""
