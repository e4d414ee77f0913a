"""Batches on which an initialization runs the model, and what it sees there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ...errors import StateError, listed

T = TypeVar("T")
GROUP_BYTES = 1 << 30
"""The statistics of as many layers are held at a time as fit in this many bytes."""


class Run:
    """A model that is run on batches.

    Args:
        calls: name of a site -> its `InitCall`.
        batches: mappings of arguments of the forward, or single arguments.
        run: (batch, names of sites) -> the gradients of their weights; without gradients, an empty list.
        title: of the progress bar.
    """

    def __init__(
        self,
        calls: Mapping[str, Any],
        batches: Iterable[object],
        run: Callable[[object, Sequence[str]], Sequence[Tensor | None]],
        title: str,
    ) -> None:
        self.calls, self.batches, self.title = calls, batches, title
        self.forward = run

    def kept(self) -> list[object]:
        """The batches as a list, for initializations that run them several times."""
        self.batches = batches = list(self.batches)
        return batches

    def shown(self, items: Iterable[T]) -> Iterator[T]:
        """Batches or names of sites, with a progress bar in a terminal."""
        yield from tqdm(items, desc=self.title, disable=None, leave=False)

    def groups(self, sizes: Mapping[str, int]) -> list[list[str]]:
        """The names of `sizes`, in groups whose statistics take at most `GROUP_BYTES` together."""
        found: list[list[str]] = []
        room = 0
        for name, size in sizes.items():
            if not found or size > room:
                found.append([])
                room = GROUP_BYTES
            found[-1].append(name)
            room -= size
        return found

    @contextmanager
    def watching(self, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within, call `see` with the name and the input of each of these layers that is called."""
        with ExitStack() as hooks:
            for name in names:
                hook: Any = partial(_pass_on, name, see)
                hooks.callback(self.calls[name].layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def leaders(self, batch: object, rows: Callable[[Tensor], Tensor]) -> dict[str, str]:
        """Name of each site -> the first site with the same input, such as query, key and value of an attention.

        Args:
            rows: the rows (N, I) of an input that matter.

        Raises:
            StateError: some layers are not called for this batch.
        """
        seen: dict[str, bytes] = {}

        def see(name: str, x: Tensor) -> None:
            values = rows(x).to(torch.float32).cpu().contiguous().numpy()
            seen.setdefault(name, hashlib.sha256(values.tobytes()).digest() + str(values.shape).encode())

        with self.watching(self.calls, see):
            self.forward(batch, [])
        self.require(seen)
        first: dict[bytes, str] = {}
        return {name: first.setdefault(seen[name], name) for name in self.calls}

    def require(self, seen: Mapping[str, object]) -> None:
        """StateError with the sites that are not in `seen`."""
        if unseen := [name for name in self.calls if name not in seen]:
            raise StateError(
                f"{self.title}: {listed(unseen)} took no part in the batches. Name them in exclude_modules, or pass "
                "batches that use them."
            )


def _pass_on(
    name: str, see: Callable[[str, Tensor], None], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    see(name, x.detach())


def marked_rows(batch: object, ignored: int | None = None) -> list[Tensor]:
    """Masks (B, T) of the positions of a batch that count: first all that `attention_mask` and `labels` allow
    together, then each alone.

    Args:
        ignored: the value of labels that do not count; None to ignore the labels.
    """
    if not isinstance(batch, Mapping):
        return []
    found = []
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        found.append(mask.bool())
    if ignored is not None and isinstance(labels, Tensor) and labels.dim() == 2:
        found.append(labels != ignored)
    if len(found) == 2 and found[0].shape == found[1].shape:
        found.insert(0, found[0] & found[1])
    return found


def rows_of(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The rows (N, I) of an input (…, I): those that the first mask of its shape selects, otherwise all."""
    for mask in masks:
        if x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
