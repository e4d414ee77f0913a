"""`ema`: an exponential moving average of all trained weights, which is evaluated and saved.

After each optimizer step the average a of the weights w is a ← d a + (1 - d) w. With n earlier updates the decay is
d = min(ema, (1 + n) / (10 + n)), and 0 for the first one, so that the start has no weight and in a short run the
average is over about its last tenth. This is the warm-up of TensorFlow's `ExponentialMovingAverage(num_updates=…)`
and of diffusers' `EMAModel`. (Averages of iterates: Polyak and Juditsky 1992; for networks, Izmailov et al. 2018,
arXiv:1803.05407.)

Evaluations, checkpoints and saved adapters have the averages. A checkpoint has the weights themselves in a file of its
own, with which the training goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..compat import move_towards
from ..errors import AdapterFileError, Faults
from .checkpoint.manifest import read_manifest
from .watch.base import Watch

logger = logging.get_logger(__name__)

FILE = "trained.safetensors"
"""In a checkpoint: the weights, and the averages of those that are not in float32, which the adapter's file rounds."""
FIELD = "average"
"""In the manifest of a checkpoint."""
_NEXT = "Resume with the ema of the first run, or start a new run from the adapter alone: --lora_adapter."


class Average(Watch):
    """The averages of a run, in float32; without a decay, there are none."""

    def __init__(self) -> None:
        self.decay, self.updates = 0.0, 0
        self.model: nn.Module | None = None
        """With all that is trained, without wrappers; set when it is adapted."""
        self._trained: list[nn.Parameter] = []
        self._averages: list[Tensor] = []
        self._aside: list[Tensor] | None = None
        """The weights, while the model has the averages."""

    @property
    def is_running(self) -> bool:
        """Whether there are averages now."""
        return bool(self._averages)

    def begin(self, decay: float) -> None:
        """Begin a run; with a decay of 0, without averages."""
        self.forget()
        self.decay = decay

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the averages, before the end of the step or a signal saves them."""
        if not self.decay:
            return
        if not self._trained:
            self._trained = [p for p in self._named().values() if p.requires_grad]
            self._averages = [p.detach().float().clone() for p in self._trained]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        with torch.no_grad():
            move_towards(self._averages, [p.float() for p in self._trained], 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averages."""
        if not self._averages or self._aside is not None:
            yield
            return
        self._aside = [p.detach().clone() for p in self._trained]
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(self._aside)
            self._aside = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.finished()

    def finished(self) -> None:
        """Leave the averages in the model, and end them."""
        if self._averages:
            self._put(self._averages)
        self.forget()

    def forget(self) -> None:
        """End the averages; the model stays as it is, such as with those of the best checkpoint."""
        self._trained, self._averages, self.updates = [], [], 0

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, float] | None:
        """Write the weights to a checkpoint, whose adapter has the averages; what the manifest says of them."""
        if not self._averages:
            return None
        weights, tensors = self._aside or self._trained, dict[str, Tensor]()
        names = {id(p): name for name, p in self._named().items()}
        for parameter, weight, average in zip(self._trained, weights, self._averages, strict=True):
            if name := names.get(id(parameter)):  # else of a layer that was left out
                tensors[f"weight.{name}"] = weight.detach().contiguous()
                if weight.dtype != torch.float32:
                    tensors[f"average.{name}"] = average
        save_file(tensors, folder / FILE)
        return {"ema": self.decay, "updates": self.updates}

    def check(self, folder: Path, saved: Mapping[str, float]) -> None:
        """Whether a run can go on with the averages of a checkpoint.

        Raises:
            AdapterFileError: it has another decay, or other tensors; lists every fault.
        """
        faults = Faults(f"Resuming from {folder}")
        if saved["ema"] != self.decay:
            ours = f"ema={self.decay:g}" if self.decay else "no ema"
            faults.add(f"it was trained with ema={saved['ema']:g}, and this run has {ours}")
        now = {name: tuple(p.shape) for name, p in self._named().items() if p.requires_grad}
        then = {
            name.removeprefix("weight."): tuple(tensor.shape)
            for name, tensor in load_file(folder / FILE).items()
            if name.startswith("weight.")
        }
        for name in sorted(now.keys() ^ then.keys() | {n for n in now.keys() & then.keys() if now[n] != then[n]}):
            faults.add(f"{name}: the model trains {now.get(name, 'none')}, and {FILE} has {then.get(name, 'none')}")
        faults.check(AdapterFileError, _NEXT)

    def resume(self, folder: Path) -> None:
        """Take the averages from a model into which a checkpoint was loaded, and put its weights back."""
        self.forget()
        saved = (read_manifest(folder) or {}).get(FIELD)
        if not self.decay:
            return
        if saved is None:
            logger.warning(f"{folder} has no averages (ema), so they begin with the next step.")
            return
        tensors, named = load_file(folder / FILE), self._named()
        self._trained = [p for p in named.values() if p.requires_grad]
        names = [name for name, p in named.items() if p.requires_grad]
        for name, parameter in zip(names, self._trained, strict=True):
            average = tensors.get(f"average.{name}", parameter.detach())
            self._averages.append(average.to(parameter.device, torch.float32, copy=True))
        self._put([tensors[f"weight.{name}"] for name in names])
        self.updates = int(saved["updates"])

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters()) if self.model is not None else {}

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._trained, values, strict=True):
                parameter.copy_(value)


class _Averaging(Protocol):
    average: Average


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=_Averaging)


def with_average(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Make a method of a trainer run while the model has the averages."""

    @functools.wraps(method)
    def run(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.average.applied():
            return method(self, *args, **kwargs)

    return run
