"""EVA (Paischer et al. 2024, arXiv:2410.07170): A from the principal components of the layer's inputs.

Ranks are distributed over the layers by how much variance each component explains, so that their sum stays that of the
configuration. All numbers are those of PEFT for the same batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, cycle, islice
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ..contract import Shape
from .base import Init, InitCall
from .batches import Run, marked_rows, rows_of
from .decompositions import refuse_others

logger = logging.get_logger(__name__)
MOST_RUNS = 1000
"""After this many batches, components that still change are used as they are."""


class Eva(Init):
    """`eva_config` has PEFT's settings.

    rho: a layer has at most rho times its rank (1: the ranks stay as they are). tau: components are used once their
    cosine similarity to those before the last batch is at least tau. use_label_mask, label_mask_value: only positions
    with labels count. whiten: divide each component by the root of its singular value. adjust_scaling_factors: change
    alpha with the rank, so that alpha / r stays.
    """

    needs: ClassVar[Literal["inputs"]] = "inputs"
    settings: Mapping[str, Any] = {
        "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
        "adjust_scaling_factors": True,
    }  # fmt: skip

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return super().refuse(layer, shape) or refuse_others(shape)

    def refuse_settings(self, values: Mapping[str, Any]) -> str | None:
        rho, tau = (values.get(name, self.settings[name]) for name in ("rho", "tau"))
        if not isinstance(rho, (int, float)) or rho < 1:
            return f"rho={rho!r} must be a number >= 1"
        if not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
            return f"tau={tau!r} must be a number from 0 to 1"
        return super().refuse_settings(values)

    def observe(self, run: Run) -> dict[str, Tensor]:
        """Name of a site -> its rows of A."""
        source = iter(run.batches)
        first = next(source)
        leaders = run.leaders(first, self._rows(first))
        ranks = {name: call.specs["lora_A"].shape[0] for name, call in run.calls.items()}
        found = {}
        for leader in dict.fromkeys(leaders.values()):
            most = max(round(ranks[name] * self.settings["rho"]) for name in leaders if leaders[name] == leader)
            found[leader] = Components(min(most, run.calls[leader].specs["lora_A"].shape[1]))
        chosen = {name: found[leader].count for name, leader in leaders.items()}
        for batch in run.shown(islice(cycle(chain([first], source)), MOST_RUNS)):
            moving = [name for name, each in found.items() if not each.settled(chosen[name], self.settings["tau"])]
            if not moving:
                break
            rows = self._rows(batch)
            with run.watching(moving, lambda name, x, rows=rows: found[name].add(rows(x))):  # type: ignore[misc]
                run.forward(batch, [])
            if all(each.directions is not None for each in found.values()):
                chosen = _distributed(found, leaders, sum(ranks.values()))
        else:
            logger.warning(f"EVA: some components still change after {MOST_RUNS} batches, and are used as they are.")
        run.require({name: name for name, leader in leaders.items() if found[leader].directions is not None})
        return {name: found[leader].best(chosen[name], self.settings["whiten"]) for name, leader in leaders.items()}

    def _rows(self, batch: object) -> Callable[[Tensor], Tensor]:
        """Input of a layer (…, I) -> the rows (N, I) that count."""
        ignored = self.settings["label_mask_value"] if self.settings["use_label_mask"] else None
        return partial(rows_of, masks=marked_rows(batch, ignored))

    def ranks(self, statistics: Mapping[str, Tensor], wanted: Mapping[str, int], options: str) -> dict[str, int]:
        return {name: len(rows) for name, rows in statistics.items()}

    def alpha(self, alpha: float, wanted: int, r: int) -> float:
        return alpha * (r / wanted) if self.settings["adjust_scaling_factors"] else alpha

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        if call.statistics is not None:  # otherwise the values follow from a checkpoint
            values["lora_A"].copy_(call.statistics)
        return values


class Components:
    """The `count` principal components of rows that come in batches (Ross et al. 2008), as PEFT computes them.

    Only the components are kept, with the mean and variance of the rows so far.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.directions: Tensor | None = None
        """(count, I)."""
        self._sizes = self._similar = torch.zeros(count)
        self._mean = self._squares = torch.zeros(())
        self._waiting: list[Tensor] = []
        self._seen = 0

    def add(self, rows: Tensor) -> None:
        """Add rows (N, I). They wait until there are as many as components."""
        self._waiting.append(rows.to(torch.float32))
        if sum(map(len, self._waiting)) < self.count:
            return
        x, before = torch.cat(self._waiting), self.directions
        self._waiting.clear()
        self._fit(x)
        if before is not None and self.directions is not None:
            self._similar = F.cosine_similarity(self.directions, before)

    def settled(self, count: int, tau: float) -> bool:
        """Whether the first `count` components hardly changed with the last rows."""
        return bool((self._similar[:count] >= tau).all())

    def shares(self) -> Tensor:
        """The share of the variance of each component (count,)."""
        return self._sizes**2 / self._squares.sum()

    def best(self, count: int, whiten: bool) -> Tensor:
        assert self.directions is not None
        best = self.directions[:count]
        return best / self._sizes[:count].sqrt()[:, None] if whiten else best

    def _fit(self, x: Tensor) -> None:
        new, sums = len(x), x.sum(0, dtype=torch.float64)
        squares = (x - sums / new).square().sum(0)
        if self.directions is None:
            self._mean, self._squares, self._seen = sums / new, squares, new
            x.sub_(self._mean)
        else:
            total, own = self._seen + new, x.mean(0)
            apart = (sums / new - self._mean).square() * (self._seen / total * new)
            shift = (self._seen / total * new) ** 0.5 * (self._mean - own)
            # The former components stand for the former rows; the shift is that of the mean.
            x = torch.vstack([self._sizes[:, None] * self.directions, x - own, shift])
            self._mean = (self._mean * self._seen + sums) / total
            self._squares, self._seen = self._squares + squares + apart, total
        sizes, directions = _decomposed(x, self.count)
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        self._sizes, self.directions = sizes[: self.count], (directions * signs)[: self.count]


def _decomposed(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(singular values, right singular vectors as rows) of x: approximated as in PEFT if x is large enough."""
    if 2 * count > min(x.shape):
        _, s, vh = torch.linalg.svd(x, full_matrices=False)
        return s, vh
    torch.manual_seed(42)  # the caller restores the random state
    _, s, v = torch.svd_lowrank(x, q=2 * count, niter=4)
    return s, v.mH


def _distributed(found: Mapping[str, Components], leaders: Mapping[str, str], budget: int) -> dict[str, int]:
    """Name of a site -> its rank: the `budget` components that explain most, of all sites together."""
    followers = [name for leader in found for name in leaders if leaders[name] == leader != name]
    names = [name for name in (*found, *followers) for _ in range(found[leaders[name]].count)]
    shares = torch.cat([found[leaders[name]].shares() for name in (*found, *followers)])
    counts = Counter(names[i] for i in shares.argsort(descending=True)[:budget].tolist())
    for name in followers:  # of equal sites, the one that is observed has the highest rank
        leader = leaders[name]
        counts[leader], counts[name] = max(counts[leader], counts[name]), min(counts[leader], counts[name])
    return {name: counts[name] for name in leaders}
