"""The small files of a merged model: its config, changed only where the adapter changes it, and its tokenizer."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..adapt.state import require_state, running_task
from ..files.base_config import changed_json
from ..layers.class_swap import unwrap_class
from .plan import Plan
from .ranges import INDEX_NAME

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = ("*token*", "*.jinja", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.spm")
PROCESSOR = ("*processor_config.json",)
CARRIED = (*TOKENIZER, *PROCESSOR, "*.json", "*.txt", "LICENSE*", "NOTICE*")
NEVER = ("*.index.json", CONFIG, "adapter_*", "hf_lora.json", "train*", "all_results.json", "eval_results.json", ".*")
FOLDERS = ("additional_chat_templates",)

Writers = dict[str, Callable[[Path], object]]


def writers_of(plan: Plan) -> Writers:
    """Name -> writer, for every file except the weights; unchanged files are copied. The config comes last."""
    base, adapter = plan.shell.checkpoint.folder, plan.shell.file.path
    found: Writers = {name: partial(shutil.copyfile, path) for name, path in _carried(base, adapter).items()}
    index = plan.index()
    if index is not None:
        same = index == plan.shell.checkpoint.index
        found[INDEX_NAME] = partial(shutil.copyfile, base / INDEX_NAME) if same else _writer(index)
    tokens = plan.shell.file.extras.get("generation")
    if tokens:
        path = base / GENERATION
        found[GENERATION] = _writer((json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | tokens)
    held = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    config = _config(plan, json.loads(json.dumps(held)))
    found[CONFIG] = partial(shutil.copyfile, base / CONFIG) if config == held else _writer(config)
    return found


def carry_folders(plan: Plan, out: Path) -> None:
    """Copy the folders that belong to a tokenizer."""
    for name in FOLDERS:
        source = plan.shell.checkpoint.folder / name
        if source.is_dir():
            shutil.copytree(source, out / name, dirs_exist_ok=True)


def _carried(base: Path, adapter: Path) -> dict[str, Path]:
    """The base's files, with the adapter's tokenizer or processor, if any, instead of the base's."""
    found = {path.name: path for path in _matching(base, CARRIED)}
    for patterns, mark in ((TOKENIZER, "tokenizer_config.json"), (PROCESSOR, "*processor_config.json")):
        if any(adapter.glob(mark)):
            found = {n: p for n, p in found.items() if not _matches(n, patterns)}
            found |= {path.name: path for path in _matching(adapter, patterns)}
    return found


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, patterns) and not _matches(path.name, NEVER):
            yield path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _writer(values: Mapping[str, object]) -> Callable[[Path], object]:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return lambda file: file.write_text(text, encoding="utf-8")


def _config(plan: Plan, values: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json with the changes of the merge."""
    model = plan.shell.model
    state = require_state(model, "merge_files")
    task = running_task(state)
    if plan.shell.foreign:
        values["architectures"] = [unwrap_class(type(model)).__name__]
    if task != state.base_task and task.id2label:
        values.pop("num_labels", None)
        values["id2label"] = {str(k): v for k, v in task.id2label.items()}
        values["label2id"] = dict(task.label2id or {})
        if task.problem_type or "problem_type" in values:
            values["problem_type"] = task.problem_type
    changed_json(values, plan.shell.file.extras)
    text = model.config.get_text_config()
    inner = next(
        (v for k, v in values.items() if isinstance(v, dict) and getattr(model.config, k, None) is text), None
    )
    size = getattr(text, "vocab_size", None)
    holder = values if inner is None else inner
    if "vocab_size" in holder:
        holder["vocab_size"] = size
    if plan.untied:
        values["tie_word_embeddings"] = False
        if inner is not None:
            inner["tie_word_embeddings"] = False
    if plan.dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]
        values |= dict.fromkeys(keys, str(plan.dtype).removeprefix("torch."))
    return values
