"""Whether a checkpoint fits the run that resumes from it: a difference would go unseen, or end the run late."""

from __future__ import annotations

from pathlib import Path

from ...errors import AdapterFileError
from .manifest import read_manifest


def check_parameter_order(folder: str | Path, names: list[str] | None) -> None:
    """Refuse to give optimizer state to other parameters than it was saved from.

    Args:
        folder: the checkpoint.
        names: the trained parameters in the optimizer's order; None where the optimizer hides them.

    Raises:
        AdapterFileError: names what differs.
    """
    manifest = read_manifest(folder)
    saved = manifest.get("parameters") if manifest else None
    if saved is None or names is None or saved == names:
        return
    lines = [f"The optimizer state in {folder} belongs to other parameters than those that are trained now:"]
    lines += [f"  - saved and not trained now: {name}" for name in saved if name not in set(names)][:10]
    lines += [f"  - trained now and not saved: {name}" for name in names if name not in set(saved)][:10]
    if len(lines) == 1:
        lines.append("  - they are the same, in another order (the rates and the order of the adapters count)")
    lines.append("Resume with the arguments of the first run, or start a new run from the adapter alone.")
    raise AdapterFileError("\n".join(lines))


def check_optimizer(folder: str | Path, found: str | None) -> None:
    """Refuse to give optimizer state to an optimizer of another class, which would fail at its first step or later.

    Args:
        folder: the checkpoint.
        found: the class of the optimizer at hand; None where an engine hides it.

    Raises:
        AdapterFileError: names both.
    """
    manifest = read_manifest(folder)
    saved = manifest.get("optimizer") if manifest else None
    if saved is not None and found is not None and saved != found:
        raise AdapterFileError(
            f"The optimizer state in {folder} is {saved}'s, and this run's optimizer is {found}. Resume with the "
            "arguments of the first run, or start a new run from the adapter alone."
        )


def check_quantization(folder: str | Path, found: list[str]) -> None:
    """Refuse to go on over a base whose weights have other values than those that were trained on.

    Args:
        folder: the checkpoint.
        found: the forms in which layers of the base at hand are quantised.

    Raises:
        AdapterFileError: names both.
    """
    manifest = read_manifest(folder)
    saved = manifest.get("quantization") if manifest else None
    if saved is None or saved == found:
        return
    was, now = (", ".join(forms) or "not quantised" for forms in (saved, found))
    raise AdapterFileError(
        f"{folder} was trained over another form of the base: it was {was} then, and is {now} now. Load the base as "
        "it was to resume; or start a new run from the adapter alone: LoraModel.from_pretrained(checkpoint, "
        "base_model=…, is_trainable=True)."
    )
