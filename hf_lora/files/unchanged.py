"""Whether the weights of a model in memory are still those of the files that it was loaded from.

They are not after a merge, `load_state_dict` or an edit. A few elements of each tensor of the backbone are compared
with the files, exactly, up to the dtypes that they may have been rounded to on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapt.embeddings import output_embedding
from ..adapt.heads import outside_backbone
from ..adapt.walk import original_modules
from ..errors import AdapterFileError
from ..layers.distributed import is_sharded
from ..safe_io.headers import Entry, read_header

ELEMENTS = 4
"""How many elements of each tensor are compared."""
HALVES = (torch.float16, torch.bfloat16)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a full model in a folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


@torch.no_grad()
def has_other_weights(model: nn.Module, files: Sequence[Path]) -> bool:
    """Whether a tensor in memory differs from the one of the same name and shape in the files.

    Heads are not compared, and neither are tensors that are packed, sharded, on meta or converted while loading.
    """
    try:
        entries = {entry.name: entry for path in files for entry in read_header(path).entries}
    except (AdapterFileError, OSError):
        return False
    prefix = getattr(model, "base_model_prefix", "")
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, tensor, may_grow in _tensors(model):
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        entry = next((entries[each] for each in names if each in entries), None)
        if entry is not None and entry.shape[1:] == tensor.shape[1:] and entry.dtype.is_floating_point:
            count = min(tensor.numel(), (entry.end - entry.start) // entry.dtype.itemsize)
            places = [(2 * i + 1) * count // (2 * ELEMENTS) for i in range(ELEMENTS)] if count else []
            if entry.dtype.itemsize > 1 and (entry.shape == tensor.shape or may_grow):
                pairs.append((tensor.detach().reshape(-1)[places].cpu(), _read(entry, places)))
    return not any(_are_same(pairs, path) for path in _ROUNDINGS)


_ROUNDINGS = [(), *((each,) for each in HALVES), *product(HALVES, HALVES)]
"""The dtypes that weights may have had between the files and their dtype in memory."""


def _are_same(pairs: Sequence[tuple[Tensor, Tensor]], roundings: Sequence[torch.dtype]) -> bool:
    for found, held in pairs:
        for dtype in roundings:
            held = held.to(dtype)
        if not torch.equal(held.to(found.dtype).nan_to_num(), found.nan_to_num()):
            return False
    return True


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, parameter, whether it is an embedding, whose rows may be resized) of the backbone, each once.

    Only ordinary floating-point parameters in memory.
    """
    heads = tuple(f"{name}." for name in outside_backbone(model))
    head, seen = output_embedding(model), set[int]()
    for path, module in original_modules(model):
        if module is head or f"{path}.".startswith(heads):
            continue
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen or type(tensor) is not nn.Parameter or tensor.is_meta:
                continue
            seen.add(id(tensor))
            plain = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and not is_sharded(tensor)
            if plain and not hasattr(tensor, "look") and (any(tensor.stride()) or tensor.numel() < 2):
                yield f"{path}.{name}" if path else name, tensor, isinstance(module, nn.Embedding)


def _read(entry: Entry, places: Sequence[int]) -> Tensor:
    """Single elements of a tensor in a file."""
    size = entry.dtype.itemsize
    data = bytearray()
    with entry.file.open("rb", buffering=0) as file:
        for place in places:
            file.seek(entry.start + place * size)
            data += file.read(size)
    return torch.frombuffer(data, dtype=entry.dtype)
