"""The identity of the base model of an adapter: that of the weights that it was trained on.

Up to three marks are recorded when LoRA is first applied: repository and commit; a hash of a local folder's
safetensors headers and of sampled bytes; and sampled weights rounded to bfloat16, which are nearly the same if the
checkpoint is loaded in another dtype: of some matrices, and of all vectors, such as norms and biases. If the weights
in memory are no longer those of the files (unchanged.py), such as after a merge, the first two say what the base is
not.

Two bases differ if one is known not to be the other; otherwise their weights decide, which are compared wherever both
are known: files of one checkpoint may differ in dtype or layout, and commits in other files. Without matrices, files
or commit must agree too: equal vectors alone prove nothing, since most training does not change them. Labels, heads,
dropout and vocabulary are not part of the identity.

Quantization is not part of it either: a base that is quantized at load is identified by its files and its dense
weights. A checkpoint of quantized weights has different files, which are compared only with those of the same kind.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapt.embeddings import output_embedding
from ..adapt.heads import outside_backbone
from ..adapt.merge import MERGED
from ..adapt.state import require_state
from ..adapt.unsaved import modules_in_no_checkpoint
from ..adapt.walk import original_modules
from ..layers.distributed import is_sharded
from .commit import cached_commit, cached_folder
from .unchanged import has_other_weights, weight_files

SAMPLED_TENSORS = 16
SAMPLED_ELEMENTS = 16
VECTOR_ELEMENTS = 4
"""Elements of each vector: one that was trained has changed everywhere."""
SAMPLED_BYTES = 4096

FILE_MARKS = ("commit", "files")
"""The marks that describe files."""

Identity = dict[str, Any]


def identify(model: nn.Module) -> Identity:
    """The available marks of a model without adapters: `name`, `commit`, `files`, `weights`, `vectors`…

    `not_files` are the marks of files whose weights the model no longer has.
    """
    config: Any = getattr(model, "config", None)
    merged = list(model.__dict__.get(MERGED, ()))
    name = getattr(config, "_name_or_path", "") or ""
    weights = sample_weights(model)
    commit = getattr(config, "_commit_hash", None)
    if name and commit is None:
        commit = cached_commit(name, weights, _sample, _same_weights)
    marks: Identity = {
        "name": name or None,
        "commit": commit,
        "files": hash_files(Path(name)) if name else None,
        "weights": weights,
        "vectors": sample_vectors(model),
        "model_type": getattr(config, "model_type", None),
        "quantized": _quantized_files(model),
        "merged": merged or None,
    }
    folder = Path(name) if commit is None or marks["files"] else cached_folder(name, commit)
    if name and not marks["quantized"] and has_other_weights(model, weight_files(folder)):
        marks = _without_files(marks)
    return {key: value for key, value in marks.items() if value is not None}


def renewed(recorded: Identity, model: nn.Module) -> Identity:
    """The identity of a model with adapters: the recorded one, unless the weights of its base have changed since.

    While adapters are merged, the weights are not those of the base.
    """
    if require_state(model, "identity").activity.merged:
        return recorded
    now: Identity = {"weights": sample_weights(model), "vectors": sample_vectors(model)}
    if all(_alike(recorded, now, mark) is not False for mark in now):
        return recorded
    return _without_files(recorded) | {mark: samples for mark, samples in now.items() if samples}


def _alike(saved: Identity, found: Identity, mark: str) -> bool | None:
    """Whether the samples that two bases have of the same tensors are of one checkpoint; None if there are none."""
    then, now = saved.get(mark) or {}, found.get(mark) or {}
    return _same_weights(then, now) if then.keys() & now.keys() else None


def _without_files(marks: Identity) -> Identity:
    """The marks of a base whose weights are not those of its files."""
    kept = {key: value for key, value in marks.items() if key not in FILE_MARKS}
    others = {key: marks[key] for key in FILE_MARKS if marks.get(key) is not None}
    return kept | {"not_files": others} if others else kept


def differs(saved: Identity, found: Identity) -> str | None:
    """How this base (`found`) differs from the one that a file names; None if it is the same or unknown."""
    if saved.get("model_type") != found.get("model_type") and saved.get("model_type") and found.get("model_type"):
        return f"the adapter was trained on a {saved['model_type']} model, this is a {found['model_type']} model"
    names = f"(trained on {saved.get('name', 'an unnamed base')}, found {found.get('name', 'an unnamed base')})"
    added = found.get("merged") if found.get("merged") != saved.get("merged") else None
    this = f"this model contains the merged {', '.join(map(repr, added))}" if added else "this is another base model"
    for changed, whole, whose in ((saved, found, "in training"), (found, saved, "in memory")):
        known = (changed.get("not_files") or {}).items()
        if any(whole.get(mark) == value for mark, value in known):
            return f"{this}: its weights {whose} were not those of its files {names}"
    if added:
        return f"{this}, and the adapter was trained without that"
    alike = saved.get("quantized") == found.get("quantized")
    marks = [mark for mark in FILE_MARKS if alike and saved.get(mark) and found.get(mark)]
    same = {mark: saved[mark] == found[mark] for mark in marks}
    matrices, vectors = _alike(saved, found, "weights"), _alike(saved, found, "vectors")
    if matrices is not None or vectors is False:
        same["weights"] = matrices is not False and vectors is not False
    if not same or same.get("weights", any(same.values())):
        return None
    what = {"commit": "its commit", "files": "its files", "weights": "its weights"}
    listed = " and ".join(what[mark] for mark, agrees in same.items() if not agrees)
    return f"this is another base model: {listed} differ {names}"


def _quantized_files(model: nn.Module) -> str | None:
    """How the weights in the checkpoint's files are quantized; None if they are dense."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not getattr(quantizer, "pre_quantized", False):
        return None
    return str(getattr(quantizer.quantization_config, "quant_method", "unknown")).rpartition(".")[2].lower()


def hash_files(folder: Path) -> str | None:
    """A hash of the headers and sampled bytes of a local folder's safetensors files; None if there are none."""
    paths = weight_files(folder)
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name}:{size}:{header}".encode())
            digest.update(file.read(min(header, size)))
            for part in range(SAMPLED_TENSORS):
                file.seek(8 + header + part * max(0, size - 8 - header) // SAMPLED_TENSORS)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


@torch.no_grad()
def sample_weights(model: nn.Module) -> dict[str, str] | None:
    """Name -> sampled elements (bfloat16, base64) of some matrices of the backbone; None if they are not available.

    Embeddings (they may be resized), heads and modules that the checkpoint lacks are skipped, and names are relative
    to the backbone. The matrices are chosen by their names alone, so that models of one checkpoint with different
    heads or poolers share most of them.
    """
    matrices: dict[str, torch.Tensor] = {}
    for name, module in _backbone(model):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2 or is_absent(weight) or not weight.dtype.is_floating_point:
            continue
        if not _is_plain(weight):
            return None  # packed or sharded: its elements are not the checkpoint's
        matrices[name] = weight
    chosen = sorted(matrices, key=lambda name: hashlib.sha256(name.encode()).digest())[:SAMPLED_TENSORS]
    return {name: _sample(matrices[name]) for name in sorted(chosen)} or None


@torch.no_grad()
def sample_vectors(model: nn.Module) -> dict[str, str] | None:
    """Name -> sampled elements of each vector of the backbone, as for the matrices; None if it has none."""
    return {
        f"{path}.{name}".removeprefix("."): _sample(tensor, VECTOR_ELEMENTS)
        for path, module in _backbone(model)
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.dim() == 1 and not is_absent(tensor)
        if tensor.dtype.is_floating_point and _is_plain(tensor)
    } or None


def _backbone(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name relative to the backbone, module) without embeddings, heads and modules that the checkpoint lacks."""
    prefix = getattr(model, "base_model_prefix", "")
    heads = tuple(f"{name}." for name in (*outside_backbone(model), *modules_in_no_checkpoint(model)))
    head = output_embedding(model)
    for name, module in original_modules(model):
        if not isinstance(module, nn.Embedding) and module is not head and not f"{name}.".startswith(heads):
            yield name.removeprefix(f"{prefix}."), module


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.dtype.itemsize > 1 and not is_sharded(tensor)


def is_absent(weight: torch.Tensor) -> bool:
    """Whether the values of a weight are not there: it is on meta, or one number stands in for them."""
    return weight.is_meta or not any(weight.stride())


def _sample(weight: torch.Tensor, count: int = SAMPLED_ELEMENTS) -> str:
    places = range(0, weight.numel(), max(1, weight.numel() // count))[:count]
    look = getattr(weight, "look", None)  # how to read single elements, of a weight that lies in a file
    elements = weight.detach().reshape(-1)[:: places.step][: len(places)] if look is None else look(places)
    return base64.b64encode(elements.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()).decode()


def _same_weights(saved: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether two samples are of one checkpoint: via float16, one element in 16 rounds to the adjacent bfloat16."""
    common = sorted(saved.keys() & found.keys())
    a, b = (torch.cat([_decoded(sample[name]) for name in common]) for sample in (saved, found))
    if a.shape != b.shape:
        return False
    near = (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * 2**-7 + 2**-24
    return bool(near.all()) and float((a != b).float().mean()) < 0.25


def _decoded(sample: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(sample)), dtype=torch.bfloat16).float()
