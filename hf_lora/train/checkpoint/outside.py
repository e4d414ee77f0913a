"""What a checkpoint has of a model around the adapted one: sentence-transformers' dense modules, trained whole.

The model saves them itself, in its own format, from which only its class can load them. A checkpoint has them also in
one file, so that resuming loads them as it loads the adapters.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...adapt.inner import outside
from ...errors import AdapterFileError, Faults

NAME = "outside.safetensors"


def save_outside(model: nn.Module | None, folder: Path) -> None:
    """Write the tensors of a model that are outside its adapted part, if there are any."""
    tensors = outside(model) if model is not None else {}
    if tensors:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, folder / NAME)


def outside_of(model: nn.Module | None, folder: str) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its value in a checkpoint) for each tensor outside the adapted part; changes nothing.

    Raises:
        AdapterFileError: the checkpoint lacks them, or has others.
    """
    tensors = outside(model) if model is not None else {}
    file = Path(folder, NAME)
    saved = load_file(file) if file.exists() else {}
    faults = Faults(f"Loading {folder}")
    for name in sorted(tensors.keys() | saved.keys()):
        now, then = (tuple(each[name].shape) if name in each else None for each in (tensors, saved))
        if now != then:
            faults.add(f"{name}: the model has {now or 'no such tensor'}, and {NAME} {then or 'no such tensor'}")
    faults.check(
        AdapterFileError,
        "Resume with the modules of the first run, or start a new run from the adapter alone: --lora_adapter.",
    )
    return [(tensor, saved[name]) for name, tensor in tensors.items()]
