"""A new head that starts at the class means of the frozen feature: a classifier before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from ..adapt.heads import is_marked
from ..errors import ConfigError
from ..layers.ops import kept_random_states

PER_CLASS = 128
"""Rows of each class that are read; a mean needs no more."""
SCALES = torch.logspace(-2, 4, 61, dtype=torch.float64)
"""Inverse temperatures that are tried, in units of the mean squared distance of a row to the mean of all."""
CLOSE = 0.01
"""Of the scales whose loss is this close to the lowest, in nats, the smallest is taken."""
STEEPEST = 100.0
"""A change of the feature by 1% changes a logit by at most about 1. Features that hardly differ would else make a head
that no training could correct."""


def start_head(
    model: Any,
    dataset: Any,
    *,
    collator: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 64,
    label_column: str = "labels",
    per_class: int = PER_CLASS,
    progress: bool = True,
) -> float:
    """Set a new head to the nearest class mean, in one pass over at most `per_class` rows of each class.

    The logit of class c is `-s / 2 * |f - m_c|^2` up to a constant, where f is what the last linear layer reads and
    m_c its mean over the class. s is the scale with the lowest loss on the same rows, each compared with the mean of
    the other rows of its class; as s = 0 is ln(classes), the loss is at most that. Both are linear in f, so they are
    the weight and the bias of the layer. (Snell et al. 2017, arXiv:1703.05175, section 2.4.)

    Args:
        model: a classifier of transformers with a new head.
        dataset: rows for the collator, with an integer label each.
        collator: rows -> a batch; default: torch's.
        label_column: the column of labels.

    Returns:
        The loss of the new head on the rows, in nats.

    Raises:
        ConfigError: the head cannot be started: no linear layer makes the logits, or a label does not fit.
    """
    head, classes = last_linear(model), int(model.config.num_labels)
    labels = _labels(dataset, label_column, classes)
    chosen = _first_of_each(labels, per_class)
    rows = Subset(dataset, chosen.tolist())
    with kept_random_states():
        features = torch.cat(list(_features(model, head, rows, collator, batch_size, label_column, progress)))
    weight, bias, loss = class_means(features.double(), labels[chosen], classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
    return loss


def last_linear(model: Any) -> Any:
    """The linear layer that makes the logits: the last one with an output for each class outside of what was loaded.

    Raises:
        ConfigError: there is none.
    """
    count = int(model.config.num_labels)
    found = [
        m for m in model.modules()
        if isinstance(m, nn.Linear) and m.out_features == count and not is_marked(m.weight)
    ]  # fmt: skip
    if not found:
        raise ConfigError(
            f"start_head: {type(model).__name__} has no new linear layer with {count} outputs. Start from a model "
            "whose head is new, such as that of hf_lora.build_classifier."
        )
    return found[-1]


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """The linear classifier by the nearest class mean.

    Args:
        features: [rows, width], float64.
        labels: [rows].

    Returns:
        weight [classes, width], bias [classes], and the loss on the rows in nats, each without its own part of the
        mean. A class without rows gets the mean of all. If each class has one row, the loss is ln(classes).
    """
    count = torch.bincount(labels, minlength=classes).to(features)
    center = features.mean(0)
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype).index_add_(0, labels, features - center)
    means = sums / count.clamp(min=1)[:, None]
    centered = features - center
    squared = means.square().sum(1)
    logits = centered @ means.T - squared / 2  # -1/2 |f - m|^2, without what all classes share
    own = labels[:, None]
    rows = count[labels]
    distance = (centered - means[labels]).square().sum(1)
    # To the mean of the others of the class: m without f is m + (m - f) / (n - 1).
    left_out = logits.gather(1, own)[:, 0] + distance / 2 - distance / 2 * (rows / (rows - 1).clamp(min=1)).square()
    logits = logits.scatter(1, own, left_out[:, None])
    spread = centered.square().sum(1).mean()
    unit = spread if spread > 0 else torch.ones_like(spread)
    most = STEEPEST / (squared.max().sqrt() * features.square().sum(1).mean().sqrt()).clamp(min=1 / STEEPEST)
    scales = (SCALES.to(features) / unit).clamp(max=most)
    several = rows > 1  # a lone row has no others to be compared with
    if several.any():
        each = [nn.functional.cross_entropy((logits * scale)[several], labels[several]) for scale in scales]
        best = next(i for i, loss in enumerate(each) if loss <= min(each) + CLOSE)
        scale, loss = scales[best], float(each[best])
    else:
        scale, loss = (1 / unit).clamp(max=most), math.log(classes)
    weight = scale * means
    return weight, -scale * squared / 2 - weight @ center, loss


def _labels(dataset: Any, name: str, classes: int) -> Tensor:
    """The labels of the rows, [rows].

    Raises:
        ConfigError: there is no such column, there are no rows, or a label is not the index of a class.
    """
    missing = ConfigError(f"start_head: the rows have no column {name!r}. Name that of the labels: label_column=…")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and name not in columns:
        raise missing
    try:
        found = list(dataset[name] if columns is not None else [row[name] for row in dataset])
    except KeyError:
        raise missing from None
    wrong = [label for label in found if not _is_index(label, classes)]
    if wrong or not found:
        what = f"{len(wrong)} of {len(found)} labels are not, such as {wrong[0]!r}" if found else "there are no rows"
        raise ConfigError(f"start_head: the labels must be indices of classes, 0 to {classes - 1}; {what}.")
    return torch.tensor([int(label) for label in found])


def _is_index(label: Any, classes: int) -> bool:
    if isinstance(label, Tensor):
        label = label.item() if label.numel() == 1 and not label.is_floating_point() else None
    return isinstance(label, Integral) and 0 <= int(label) < classes


def _first_of_each(labels: Tensor, count: int) -> Tensor:
    """The positions of the first `count` rows of each class, in order."""
    seen: dict[int, int] = {}
    keep = []
    for position, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            keep.append(position)
    return torch.tensor(keep)


def _of_the_row(features: Tensor, output: Tensor, logits: Tensor) -> Tensor:
    """What the head reads for each row: that of one token where the head reads all, as in decoders.

    Args:
        features, output: of the head, [B, width] or [B, T, width], and [B, C] or [B, T, C].
        logits: of the model, [B, C].
    """
    if features.dim() == 2:
        features, output = features[:, None], output[:, None]
    fits = features.dim() == 3 and len(output) == len(logits)
    taken = (output == logits[:, None]).all(-1) if fits else torch.zeros(1, 1)
    if not taken.any(1).all():
        raise ConfigError("start_head: the logits are not those of the last linear layer. Use another head_init.")
    return features[torch.arange(len(features)), taken.int().argmax(1)]


@torch.no_grad()
def _features(
    model: Any, head: nn.Module, rows: Any, collator: Any, batch_size: int, label_column: str, progress: bool
) -> Iterator[Tensor]:
    """What the head reads, batch by batch, in float32 on the CPU."""
    read: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, output: read.append((args[0].detach(), output.detach())))
    training = {module: module.training for module in model.modules()}
    model.eval()
    batches: Any = DataLoader(rows, batch_size, collate_fn=collator)
    try:
        for batch in logging.tqdm(batches, desc="class means", disable=not progress, leave=False, delay=1):
            batch = {k: v.to(model.device) for k, v in batch.items() if k != label_column}
            logits = model(**batch).logits
            if not read:
                raise ConfigError(
                    "start_head: the head that was added last does not run, because another adapter is active or "
                    "adapters are disabled. Activate its adapter, or start the head before adapters are added."
                )
            yield _of_the_row(*read.pop(), logits).float().cpu()
            read.clear()
    finally:
        hook.remove()
        for module, was in training.items():
            module.training = was
