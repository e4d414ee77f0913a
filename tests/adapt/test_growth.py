"""Work grows with the size of a model or configuration, not with its square: calls of functions are counted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn

from hf_lora import LoraConfig
from hf_lora.adapt.inject import inject
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter


def calls(do: Callable[[], object]) -> int:
    """How many functions `do` calls, those written in C included."""
    count = 0

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        do()
    finally:
        sys.setprofile(before)
    return count


def layers(n: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))
    return model


def names(n: int) -> list[str]:
    return [f"layers.{i}" for i in range(n)]


def rows_of_patterns(n: int, folder: Path) -> None:
    inject(layers(n), LoraConfig(r=1, target_modules=names(n), rank_pattern=dict.fromkeys(names(n), 1)))


def escaped_rows(n: int, folder: Path) -> None:
    table = {f"^{re.escape(name)}": 2.0 for name in names(n)}
    inject(layers(n), LoraConfig(r=1, target_modules=names(n), alpha_pattern=table))


def whole_modules(n: int, folder: Path) -> None:
    inject(layers(n), LoraConfig(r=1, target_modules=names(2), modules_to_save=names(n)[2:]))


def whole_modules_in_a_file(n: int, folder: Path) -> None:
    model = layers(n)
    inject(model, LoraConfig(r=1, target_modules=names(2), modules_to_save=names(n)[2:], bias="all"))
    save_adapter(model, folder / str(n))
    load_adapter(layers(n), folder / str(n))


def one_expression(n: int, folder: Path) -> None:
    inject(layers(n), LoraConfig(r=1, target_modules="|".join(map(re.escape, names(n)))))


def adapters_one_by_one(n: int, folder: Path) -> None:
    model = layers(3)
    for i in range(n):
        inject(model, LoraConfig(r=1, target_modules=["0", "1", "2"]), f"a{i}")


WORK = [rows_of_patterns, escaped_rows, whole_modules, whole_modules_in_a_file, one_expression, adapters_one_by_one]


@pytest.mark.parametrize("work", WORK)
def test_twice_as_much_takes_at_most_about_twice_the_calls(work: Callable[[int, Path], None], tmp_path: Path) -> None:
    work(3, tmp_path)  # imports and caches
    n = 40 if work is adapters_one_by_one else 150
    small, large = calls(lambda: work(n, tmp_path)), calls(lambda: work(2 * n, tmp_path))
    assert large < 2.15 * small, (small, large)
