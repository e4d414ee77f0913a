"""The commit of a base model from the Hub, found in the client's cache: a loaded model no longer tells it.

The cache keeps a folder for each commit that was downloaded. The one is taken whose files hold the model's weights;
where several do, they differ in other files, and the one that `main` was last is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

COMPARED = 2
"""Matrices that are read from the files."""


def cached_commit(name: str, samples: Mapping[str, Any] | None, sample: Any, same: Any) -> str | None:
    """The commit; None where the cache does not tell it.

    Args:
        name: of the repository.
        samples: name -> sample of some of the model's weights; None where they cannot be sampled.
        sample: makes a sample of a tensor.
        same: whether two mappings of samples are of the same weights.
    """
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists():
        return None
    storage = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    found = {}
    for folder in storage.glob("snapshots/*"):
        files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if re.fullmatch(r"[0-9a-f]{40}", folder.name) and files:
            found[folder.name] = _holds(files, samples or {}, sample, same)
    sure = [commit for commit, holds in found.items() if holds]
    if not sure and len(found) == 1 and None in found.values():
        sure = list(found)  # named otherwise than in memory: the only one there is
    ref = storage / "refs" / "main"
    main = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    return main if main in sure else (sure[0] if len(sure) == 1 else None)


def _holds(files: list[Path], samples: Mapping[str, Any], sample: Any, same: Any) -> bool | None:
    """Whether the files hold the sampled weights; None where none of the names is in them."""
    from safetensors import SafetensorError, safe_open

    read: dict[str, Any] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                for name in samples:
                    key = next((k for k in keys if k == name or k.endswith(f".{name}")), None)
                    if key is not None and name not in read and len(read) < COMPARED:
                        tensor = file.get_tensor(key)
                        if tensor.dim() >= 2 and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                            read[name] = sample(tensor)
    except (SafetensorError, OSError):
        return False
    return bool(same({name: samples[name] for name in read}, read)) if read else None
