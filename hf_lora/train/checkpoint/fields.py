"""What the manifest of a checkpoint says of its run, and what of it must be the same where a run resumes.

A difference would go unseen, or end the run late. One more field is one entry of `FIELDS`.
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
from ..watch.guard import NEVER_CALLED

FIRST_RUN = "Resume with the arguments of the first run, or start a new run from the adapter alone."


@dataclass
class Run:
    """What of a run the fields describe.

    Args:
        model: without what Accelerate puts around it.
        optimizer: None before it is made.
        groups: the parameter groups it was made for, where DeepSpeed has taken it over; see `engines.groups_of`.
        quantization: the forms in which layers of the base are quantized, before an engine shards them.
    """

    model: nn.Module
    optimizer: Any
    groups: list[dict[str, Any]]
    quantization: list[str]


class Field(NamedTuple):
    """One entry of the manifest.

    Args:
        save: what the manifest holds of a run, as JSON; it may put a file into the checkpoint's folder, too.
        resume: given the folder and the saved value, refuse to go on, or bring the run to where it was.
        of_optimizer: whether it is about the optimizer's state, so that it counts only where that is resumed.
    """

    save: Callable[[Path, Run], Any]
    resume: Callable[[Path, Any, Run], None]
    of_optimizer: bool


def resume_fields(folder: Path, manifest: Mapping[str, Any], run: Run, of_optimizer: bool) -> None:
    """Let every field see what was saved; a checkpoint of an older release or of a plain Trainer lacks some.

    Raises:
        AdapterFileError: the run is another one; says where.
    """
    for name, field in FIELDS.items():
        if field.of_optimizer == of_optimizer and manifest.get(name) is not None:
            field.resume(folder, manifest[name], run)


def _parameters(run: Run) -> list[str] | None:
    """Names of the trained parameters in the optimizer's order; None where it hides them."""
    names = {id(p): n for n, p in run.model.named_parameters()}
    groups = run.groups or getattr(run.optimizer, "param_groups", [])
    ordered = [names.get(id(p)) for group in groups for p in group["params"]]
    return None if None in ordered else [n for n in ordered if n is not None]


def _same_parameters(folder: Path, saved: list[str], run: Run) -> None:
    names = _parameters(run)
    if names is None or saved == names:
        return
    lines = [f"The optimizer state in {folder} belongs to other parameters than those that are trained now:"]
    lines += [f"  - saved and not trained now: {name}" for name in saved if name not in set(names)][:10]
    lines += [f"  - trained now and not saved: {name}" for name in names if name not in set(saved)][:10]
    if len(lines) == 1:
        lines.append("  - they are the same, in another order (the rates and the order of the adapters count)")
    raise AdapterFileError("\n".join([*lines, FIRST_RUN]))


def _optimizer(run: Run) -> str | None:
    """Its library and class, such as torch.AdamW; None under DeepSpeed, which has classes of its own."""
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    if inner is None or zero_partitions(inner) is not None:
        return None
    return f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}"


def _same_optimizer(folder: Path, saved: str, run: Run) -> None:
    found = _optimizer(run)
    if found is not None and saved != found:
        raise AdapterFileError(
            f"The optimizer state in {folder} is {saved}'s, and this run's optimizer is {found}. {FIRST_RUN}"
        )


def _same_quantization(folder: Path, saved: list[str], run: Run) -> None:
    if saved != run.quantization:
        was, now = (", ".join(forms) or "not quantized" for forms in (saved, run.quantization))
        raise AdapterFileError(
            f"{folder} was trained over another form of the base: it was {was} then, and is {now} now. Load the base "
            "as it was to resume; or start a new run from the adapter alone: LoraModel.from_pretrained(checkpoint, "
            "base_model=…, is_trainable=True)."
        )


def _left_out(folder: Path, run: Run) -> dict[str, list[str]]:
    """Adapter -> layers that the guard took it off: a fresh model has to lose them before it can resume."""
    records = require_state(run.model, "save_model").adapters
    found = {n: [p for p, why in r.skipped.items() if why == NEVER_CALLED] for n, r in records.items()}
    return {name: paths for name, paths in found.items() if paths}


def _leave_out(folder: Path, saved: dict[str, list[str]], run: Run) -> None:
    for name, paths in saved.items():
        drop_layers(run.model, name, set(paths), NEVER_CALLED)


FIELDS: dict[str, Field] = {
    "parameters": Field(lambda folder, run: _parameters(run), _same_parameters, of_optimizer=True),
    "quantization": Field(lambda folder, run: run.quantization, _same_quantization, of_optimizer=False),
    "left_out": Field(_left_out, _leave_out, of_optimizer=False),
    "optimizer": Field(lambda folder, run: _optimizer(run), _same_optimizer, of_optimizer=True),
}
"""Name in the manifest -> what it holds."""
