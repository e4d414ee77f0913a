"""A picture of the losses of a training, where matplotlib is there to draw it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

Points = list[tuple[float, float]]

COLOURS = ("#b3541e", "#2f7d4f", "#7a4fa3", "#8a6d00", "#a33b5e")
"""Of the evaluations; the training is blue."""


def losses_of(history: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Name -> (step, loss) of a Trainer's log: `train`, and one for each set that was evaluated.

    Evaluations after the end of the training are left out: they are of one moment, and may be of other weights.
    """
    found: dict[str, Points] = {}
    for entry in history:
        step = entry.get("step")
        if "train_runtime" in entry:
            break
        if not isinstance(step, (int, float)):
            continue
        for key, value in entry.items():
            name = "train" if key == "loss" else key.removesuffix("_loss") if key.endswith("_loss") else None
            if (
                name is None
                or (name == "train" and key != "loss")
                or f"{name}_runtime" not in {*entry, "train_runtime"}
            ):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, []).append((float(step), float(value)))
    return found


def draw_curve(history: Iterable[Mapping[str, Any]], unit: str = "") -> bytes | None:
    """Draw the training and evaluation losses by step as a PNG.

    Args:
        history: `trainer.state.log_history`.
        unit: of the loss, such as nats a token.

    Returns:
        The PNG, the same for the same history; None without matplotlib, or where no loss was logged twice.
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
    with matplotlib.style.context("default"):  # whatever the user's own style is
        figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained", facecolor="white")
        axes = figure.subplots()
        colours = iter(COLOURS * (len(losses) // len(COLOURS) + 1))
        for name, points in losses.items():
            trains = name == "train"
            marker = "o" if len(points) == 1 or (len(points) <= 40 and not trains) else ""
            label = "training" if trains else f"evaluation ({name.removeprefix('eval_')})"
            label = "evaluation" if name == "eval" else label.replace("$", r"\$")
            axes.plot(
                *zip(*points, strict=True), label=label, marker=marker, markersize=4, linewidth=1.6,
                color="#2a6fb0" if trains else next(colours),
            )  # fmt: skip
        axes.set_xlabel("step of the optimizer")
        axes.set_ylabel(f"loss ({unit})" if unit else "loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        values = [value for points in losses.values() for _, value in points]
        if min(values) >= 0 and min(values) < 0.5 * max(values):
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
