"""Summarize an adapter's file layer by layer, with the norm of each update, without the base model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapt.match import PatternTable
from ..config import LoraConfig
from ..data.trained import TrainedFormat
from ..errors import AdapterFileError, Faults, TargetError
from ..layers.storages import fits
from ..safe_io.reading import REPAIR
from .format import EXTRAS_NAME, WEIGHTS_NAME, AdapterFile, read_adapter
from .keys import factors_of, matrices, split_key


@dataclass
class LayerSummary:
    """One adapted layer of a file.

    Args:
        path: the layer's name in the model.
        features: (I, O): inputs and outputs (rows and columns of an embedding, channels of a convolution).
        r, alpha, scaling: the values for this layer, after applying the patterns of the configuration.
        norm: Frobenius norm of the update, scaling · B A.
        stable_rank: squared norm divided by the squared largest singular value, from 1 to r: the effective rank of the
            update; 0 for an update of zero.
        parameters: number of elements of all its factors.
    """

    path: str
    features: tuple[int, int]
    r: int
    alpha: float
    scaling: float
    norm: float
    stable_rank: float
    parameters: int


@dataclass
class AdapterSummary:
    """The result of `inspect_adapter`; `str()` of it is a table.

    Args:
        path: the adapter's folder.
        config: its configuration.
        extras: the content of hf_lora.json; empty if another library wrote the adapter.
        layers: the adapted layers, sorted by name.
        whole: name -> number of elements, for parameters that are saved completely: heads, `modules_to_save`, biases.
        parameters: number of elements of all tensors.
        bytes: size of the weights file.
    """

    path: Path
    config: LoraConfig
    extras: dict[str, Any]
    layers: list[LayerSummary]
    whole: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return float(sum(layer.norm**2 for layer in self.layers) ** 0.5)

    def __str__(self) -> str:
        config = self.config
        head = [f"{self.path}: {self.parameters:,} parameters, {self.bytes:,} bytes"]
        head.append(
            f"base model: {config.base_model_name_or_path or 'not named'}; task: {config.task_type or 'not named'}"
        )
        if self.extras.get("num_labels") and config.task_type != "CAUSAL_LM":
            names = list((self.extras.get("id2label") or {}).values())
            head.append(
                f"labels: {self.extras['num_labels']} ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})"
            )
        trained = TrainedFormat.from_json(self.extras.get("training_format"))
        if trained is not None:
            head.append(f"training rows: {trained}")
        if not self.extras:
            head.append(f"no {EXTRAS_NAME}: written by another library")
        cells = [("layer", "shape", "r", "alpha", "update norm", "stable rank", "parameters")]
        for s in self.layers:
            shape = f"{s.features[0]} -> {s.features[1]}"
            cells.append((s.path, shape, str(s.r), f"{s.alpha:g}", f"{s.norm:.4g}", f"{s.stable_rank:.2f}",
                          f"{s.parameters:,}"))  # fmt: skip
        total = sum(s.parameters for s in self.layers)
        cells.append((f"{len(self.layers)} layers", "", "", "", f"{self.norm:.4g}", "", f"{total:,}"))
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        table = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        whole = ["kept whole:", *(f"  {name}: {count:,}" for name, count in self.whole.items())] if self.whole else []
        return "\n".join([*head, "", *table, *whole])

    def plot(self, file: str | os.PathLike[str]) -> Path:
        """Plot the update norm of each layer over the depth of the model, one line for each kind of layer.

        Args:
            file: an image, such as `norms.png`; the suffix determines the format.

        Raises:
            AdapterFileError: matplotlib is not installed, does not support the format, or cannot write the file.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise AdapterFileError("Plotting needs matplotlib. Run: pip install matplotlib") from error
        kinds: dict[str, list[tuple[int, float]]] = {}
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for layer in self.layers:
            kind, depth = _kind(layer.path)
            if depth is None:
                axes.axhline(layer.norm, linestyle="--", color=f"C{len(axes.lines) % 10}", label=kind)
            else:
                kinds.setdefault(kind, []).append((depth, layer.norm))
        markers = "osD^v<>pP*Xh"
        for i, (kind, points) in enumerate(kinds.items()):
            depths, norms = zip(*sorted(points), strict=True)
            axes.plot(depths, norms, marker=markers[i // 10 % len(markers)], color=f"C{i % 10}", label=kind)
        axes.set_xlabel("layer of the model")
        axes.set_ylabel("norm of the update, ‖scaling · B A‖")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{self.path.name}: r={self.config.r}, {len(self.layers)} layers", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
        if not Path(file).suffix:
            raise AdapterFileError(
                f"{file} does not end with a format of images. Name it {Path(file).name}.png, for instance."
            )
        try:
            figure.savefig(file, dpi=150)
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{file} could not be written ({error}).") from error
        return Path(file)


def inspect_folder(path: str | os.PathLike[str]) -> AdapterSummary:
    """Read an adapter's folder and summarize its layers. Norms are computed from R x R matrices, not from B A.

    Raises:
        AdapterFileError: a file is missing or malformed, or a layer lacks one of its factors.
    """
    file = read_adapter(path)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, int] = {}
    for key, tensor in file.tensors.items():
        name, role = split_key(key)
        if role in ("copy", "bias"):
            whole[name if role == "copy" else f"{name}.bias"] = tensor.numel()
        else:
            factors.setdefault(name, {})[role] = tensor
    declared = factors_of(file.config)
    half = [name for name, found in factors.items() if found.keys() != set(declared)]
    if half:
        raise AdapterFileError(
            f"{file.path}: {', '.join(half[:5])}{' …' if len(half) > 5 else ''} must have exactly "
            f"{' and '.join(declared)}. The file is incomplete, or of another method."
        )
    faults = Faults(str(file.path))
    for name, found in factors.items():
        _check_factors(name, found, faults)
    faults.check(AdapterFileError, REPAIR)
    alphas = PatternTable(file.config.alpha_pattern)
    try:
        layers = [_summary(file, name, factors[name], alphas) for name in sorted(factors, key=_natural)]
    except TargetError as error:  # a pattern that takes too long
        raise AdapterFileError(f"{file.path}: {error}") from error
    return AdapterSummary(
        file.path,
        file.config,
        file.extras,
        layers,
        whole,
        sum(t.numel() for t in file.tensors.values()),
        (file.path / WEIGHTS_NAME).stat().st_size,
    )


def _check_factors(name: str, factors: dict[str, Tensor], faults: Faults) -> None:
    """Check that B A can be multiplied."""
    a, b = (factors[each] for each in matrices())
    if a.shape[0] % b.shape[1] or b.shape[0] % (a.shape[0] // b.shape[1]):
        down, up = matrices()
        faults.add(f"{name}: {down} {list(a.shape)} and {up} {list(b.shape)} cannot be multiplied")
    elif not all(fits(t, torch.float32) for t in factors.values()):
        faults.add(f"{name}: its factors hold NaN or infinity")


def _summary(file: AdapterFile, name: str, factors: dict[str, Tensor], alphas: PatternTable) -> LayerSummary:
    a, b = (factors[each] for each in matrices())
    r = a.shape[0]
    alpha = alphas.get(name, file.config.alpha)
    scaling = file.config.scaling(r, alpha)
    values = scaling * singular_values(a, b)
    norm = float(values.norm())
    largest = float(values.max())
    stable = (norm / largest) ** 2 if largest > 0 else 0.0
    parameters = sum(t.numel() for t in factors.values())
    return LayerSummary(name, (a.shape[1], b.shape[0]), r, alpha, scaling, norm, stable, parameters)


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """The singular values of B A in float64, from the triangular factors of B and Aᵀ: no O x I matrix is formed.

    Args:
        a: (R, I, *kernel).
        b: (O, R / groups, …); with several groups each block of outputs has separate ranks.
    """
    a, b = a.double().flatten(1), b.double().flatten(1)
    groups = a.shape[0] // b.shape[1]
    parts = []
    for rows, columns in zip(a.chunk(groups), b.chunk(groups), strict=True):
        outer = torch.linalg.qr(columns, mode="r").R
        inner = torch.linalg.qr(rows.t(), mode="r").R
        parts.append(torch.linalg.svdvals(outer @ inner.t()))
    return torch.cat(parts)


def _kind(path: str) -> tuple[str, int | None]:
    """A layer's name with its first number replaced by `*`, and that number."""
    found = re.search(r"(?:^|\.)(\d+)\.", path)
    if found is None:
        return path, None
    return f"{path[: found.start(1)]}*{path[found.end(1) :]}", int(found[1])


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
