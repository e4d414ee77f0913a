"""A plot of the losses of a training, if matplotlib is installed."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping

Points = list[tuple[float, float]]


def losses_of(history: Iterable[Mapping[str, object]]) -> dict[str, Points]:
    """Name -> (step, loss) from a Trainer's log: `train`, and one for each evaluation dataset.

    Evaluations after the end of the training are omitted, since they may be of other weights.
    """
    found: dict[str, Points] = {}
    for entry in history:
        if "train_runtime" in entry:
            break
        losses = {key.removesuffix("_loss"): key for key in entry if key.endswith("_loss")}
        losses = {name: key for name, key in losses.items() if f"{name}_runtime" in entry} | {"train": "loss"}
        for name, key in losses.items():
            step, value = entry.get("step"), entry.get(key)
            if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((float(step), float(value)))
    return found


def draw_curve(history: Iterable[Mapping[str, object]], unit: str = "") -> bytes | None:
    """Draw the training and evaluation losses by step as a PNG.

    Args:
        history: `trainer.state.log_history`.
        unit: of the loss, such as nats per token.

    Returns:
        The PNG, which is deterministic; None without matplotlib, or if no loss was logged twice.
    """
    losses = losses_of(history)
    if not any(len(points) > 1 for points in losses.values()):
        return None
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    with matplotlib.style.context("default"):  # independent of the user's style
        figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
        axes = figure.subplots()
        for name, points in losses.items():
            label = {"train": "training", "eval": "evaluation"}.get(name, f"evaluation ({name.removeprefix('eval_')})")
            marker = "o" if len(points) <= (1 if name == "train" else 40) else ""
            axes.plot(*zip(*points, strict=True), label=label.replace("$", r"\$"), marker=marker, markersize=4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"loss ({unit})" if unit else "loss")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.4)
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
