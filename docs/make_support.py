"""Write docs/support.md: what can be combined, according to what the code accepts and refuses.

Run it as `.venv/bin/python docs/make_support.py` after a change of methods, initializations, shapes, storages or
engines; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_lora import INITS, METHODS, STORAGES, LoraError
from hf_lora.adapt.inject import _BEFORE_SHARDING as SHARDED
from hf_lora.layers.base import start_layer
from hf_lora.layers.hosts import Activity
from hf_lora.layers.registry import Registry
from hf_lora.layers.shapes import shape_of
from hf_lora.layers.storages import storage_of
from hf_lora.train.engines import check_engine

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "transposed (`Conv1D`)": lambda: Conv1D(8, 8),
    "embedding": lambda: nn.Embedding(8, 8),
    "convolution": lambda: nn.Conv2d(8, 8, 3),
    "grouped convolution": lambda: nn.Conv2d(8, 8, 3, groups=2),
}
NEEDS = {
    "nothing": "the weight at most", "inputs": "batches", "gradients": "batches with labels",
    "original": "the weights of the checkpoint",
}  # fmt: skip
ENGINES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "one device": ("NO", {}),
    "DDP": ("MULTI_GPU", {}),
    "FSDP version 1": ("FSDP", {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}),
    "FSDP version 2": ("FSDP", {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}),
    **{f"ZeRO-{n}": ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero_stage=n)}) for n in (1, 2, 3)},
}
SHARDS = {"FSDP version 2": "FSDP2", "ZeRO-3": "ZeRO-3"}
"""Engine -> the name with which its models are refused after it started."""

INTRODUCTION = """# What can be combined

<!-- Written by docs/make_support.py. Edit that file instead. -->

This page is written by `docs/make_support.py` from what the code accepts and refuses, and a test compares. What is
refused is refused by name, before anything changes. [Methods](methods.md) says what each does,
[Architectures](architectures.md) which models were tried.
"""


class Notes:
    """Reasons, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def mark(self, word: str, reason: str | None) -> str:
        if reason is None:
            return word
        if reason not in self.found:
            self.found.append(reason)
        return f"{word} ({self.found.index(reason) + 1})"

    def lines(self) -> str:
        return "".join(f"\n{i}. {reason}" for i, reason in enumerate(self.found, 1)) + "\n" if self.found else ""


def built_in(registry: Registry[T]) -> list[tuple[str, T]]:
    """The entries that are not another package's."""
    return [(name, registry[name]) for name in registry._built_in]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def adapted(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """(a layer that could get adapters, its shape)."""
    layer = make()
    shape, storage = shape_of(layer), storage_of(layer)
    assert shape is not None
    assert storage is not None
    return start_layer(layer, shape, storage, Activity()), shape


def of_methods() -> str:
    """Method × shape, with merging."""
    notes, rows = Notes(), []
    for name, method in built_in(METHODS):
        cells = []
        for make in LAYERS.values():
            layer, shape = adapted(make)
            refused = method.refuse(make(), shape)
            cells.append(
                notes.mark("no", refused)
                if refused is not None
                else notes.mark("yes" if (kept := method.refuse_folding(layer)) is None else "unmerged", kept)
            )
        rows.append([f"`{name}`", *cells])
    return (
        "\n## Methods and layers\n\nyes: trained, saved, loaded and merged. unmerged: everything but merging.\n"
        + table(["method", *LAYERS], rows)
        + notes.lines()
    )


def of_initializations() -> str:
    """Initialization × shape, and what it needs."""
    notes, rows = Notes(), []
    for name, init in built_in(INITS):
        cells = [NEEDS[init.needs], "frozen factors" if init.takes_out else ""]
        for make in LAYERS.values():
            _, shape = adapted(make)
            refused = init.refuse(make(), shape)
            cells.append("yes" if refused is None else notes.mark("no", refused))
        rows.append([f"`{name}`", *cells])
    head = ["initialization", "needs", "subtracts from the base", *LAYERS]
    return "\n## Initializations and layers\n" + table(head, rows) + notes.lines()


def of_pairs() -> str:
    """Initialization × method."""
    notes, rows = Notes(), []
    for name, init in built_in(INITS):
        refused = [init.refuse_method(method) for _, method in built_in(METHODS)]
        rows.append([f"`{name}`", *("yes" if why is None else notes.mark("no", why) for why in refused)])
    head = ["initialization", *(f"`{name}`" for name, _ in built_in(METHODS))]
    return "\n## Initializations and methods\n" + table(head, rows) + notes.lines()


def of_storages() -> str:
    """Storage × what can be done."""
    rows = []
    for _, storage in built_in(STORAGES):
        unread = "yes" if storage.readable else "no"
        rows.append([
            "an unknown quantized format" if storage.kind == "opaque" else storage.kind,
            "yes",
            unread,
            unread,
            "no" if storage.quantized else "yes",
            ("yes, the model becomes dense" if storage.quantized else "yes") if storage.readable else "no",
        ])  # fmt: skip
    head = [
        "weights", "additive methods", "`dora`", "initializations from the weight", "`merge_adapter`",
        "`merge_and_unload`",
    ]  # fmt: skip
    return (
        "\n## Weights\n\n`loftq` is for quantized weights alone; `lora_ga` needs gradients, which they do not have.\n"
        + table(head, rows)
    )


def of_engines() -> str:
    """Engine × what can be done."""
    notes, rows = Notes(), []
    for name, (kind, state) in ENGINES.items():
        refused = _why(partial(_check, kind, state))
        sharded = SHARDED.get(SHARDS.get(name, ""))
        rows.append(
            [
                name,
                "yes" if refused is None else notes.mark("no", refused),
                "" if refused is not None else "yes" if sharded is None else notes.mark("before", sharded),
                "" if refused is not None else "yes" if sharded is None else "on a model that is not sharded",
            ]
        )
    head = ["engine", "`LoraTrainer`, every method", "`apply_lora`", "merging"]
    return "\n## Engines\n" + table(head, rows) + notes.lines()


def _check(kind: str, state: Mapping[str, Any]) -> None:
    found = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**state), num_processes=1)
    args: Any = SimpleNamespace(fsdp=None, deepspeed=None)
    accelerator: Any = found
    asked: TrainingArguments = args
    check_engine(asked, accelerator, None, True, "LoraTrainer")


def _why(check: Callable[[], object]) -> str | None:
    try:
        check()
    except LoraError as error:
        return str(error).removeprefix("LoraTrainer: ")
    return None


@torch.no_grad()
def page() -> str:
    return INTRODUCTION + of_methods() + of_initializations() + of_pairs() + of_storages() + of_engines()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
