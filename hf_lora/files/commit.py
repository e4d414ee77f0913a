"""The commit of a base model from the Hub, found in the local cache, because a loaded model does not have it.

The cache has a folder for each downloaded commit. The result is the commit whose files contain the model's weights;
if several do, they differ in other files, and the last known `main` is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Sample = Callable[[torch.Tensor], str]
Same = Callable[[Mapping[str, str], Mapping[str, str]], bool]

COMPARED = 2
"""How many matrices are read from the files."""


def cached_commit(name: str, samples: Mapping[str, str] | None, sample: Sample, same: Same) -> str | None:
    """The commit; None if the cache does not show it.

    Args:
        name: name of the repository.
        samples: name -> sample of some of the model's weights; None if they cannot be sampled.
        sample: returns the sample of a tensor.
        same: whether two mappings of samples are of the same weights.
    """
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists():
        return None
    storage = Path(constants.HF_HUB_CACHE) / _storage(name)
    found = {}
    for folder in storage.glob("snapshots/*"):
        files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if re.fullmatch(r"[0-9a-f]{40}", folder.name) and files:
            found[folder.name] = _holds(files, samples or {}, sample, same)
    certain = [commit for commit, holds in found.items() if holds]
    if not certain and len(found) == 1 and None in found.values():
        certain = list(found)  # the only one, with other names than in memory
    ref = storage / "refs" / "main"
    main = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    return main if main in certain else (certain[0] if len(certain) == 1 else None)


def cached_folder(name: str, commit: str) -> Path:
    """Where the cache has the files of a commit, if it does."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / _storage(name) / "snapshots" / commit


def _storage(name: str) -> str:
    return f"models--{name.replace('/', '--')}"


def _holds(files: list[Path], samples: Mapping[str, str], sample: Sample, same: Same) -> bool | None:
    """Whether the files contain the sampled weights; None if they contain none of the names."""
    from safetensors import SafetensorError, safe_open

    read: dict[str, str] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                for name in samples:
                    key = next((k for k in keys if f".{k}".endswith(f".{name}.weight")), None)
                    if key is not None and name not in read and len(read) < COMPARED:
                        tensor = file.get_tensor(key)
                        if tensor.dim() >= 2 and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                            read[name] = sample(tensor)
    except (SafetensorError, OSError):
        return False
    return bool(same({name: samples[name] for name in read}, read)) if read else None
