"""The model card of a Trainer's adapter: facts of the run from its arguments and its log."""

from __future__ import annotations

import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sized
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..adapt.report import trainable_parameters
from ..adapt.state import require_state
from ..compat import train_batch_size
from ..errors import AdapterFileError
from ..files.save import adapter_folder
from ..hub.card.card_data import Run, Score, facts_of, is_repository, scores_of
from ..hub.card.escape import command_line
from ..hub.card.write import write_card
from ..layers.storages import libraries_of
from .precision import base_precision

logger = logging.get_logger(__name__)

_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+|[^/@]+)@([0-9a-f]{40})/")


class CardWriter:
    """Writes `README.md`, and reuses the arguments of earlier calls."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def write(self, trainer: Trainer, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Write the card of the adapter to `output_dir`; `given` are the arguments of `Trainer.create_model_card`.

        If the existing README cannot be kept, this is an AdapterFileError, or a warning during training.
        """
        ordered = sorted(given.items(), key=lambda entry: entry[0] == "dataset")  # overrides TRL's dataset_name
        self.arguments |= {_NAMES.get(name, name): value for name, value in ordered if value is not None}
        known = {name: value for name, value in self.arguments.items() if name in _CARD}
        data, split = _first(known.pop("data", None)), _first(known.pop("split", None))
        known |= {name: _first(known.get(name)) for name in ("task", "license")}
        for key in ("tags", "datasets"):
            known[key] = [known[key]] if isinstance(known.get(key), str) else known.get(key)
        folder = Path(str(trainer.args.output_dir))
        state = require_state(model, "create_model_card")
        name = next(iter(state.activity.active or state.adapters))
        run = run_of(trainer, model, data, split, known["datasets"] or [])
        plain_loss = trainer.compute_loss_func is None and getattr(trainer.args, "loss_type", None) in (None, "nll")
        # The current adapter may be saved in the folder or in the checkpoint of this step.
        saved = [adapter_folder(model, f, name) for f in (folder, folder / f"checkpoint-{trainer.state.global_step}")]
        repository = trainer.hub_model_id or trainer.args.hub_model_id
        try:
            facts = facts_of(model, name, saved)
            run.unit = facts.unit if plain_loss else ""
            history = trainer.state.log_history
            write_card(folder, history=history, repo_id=repository, run=run, adapter=facts, **known)
        except AdapterFileError as error:
            if not trainer.is_in_train:
                raise
            logger.warning(f"The card was not written; training continues. {error}")


_NAMES = {
    "tasks": "task", "finetuned_from": "base_model", "dataset_tags": "datasets", "dataset": "data",
    "dataset_name": "data", "dataset_args": "split",
}  # fmt: skip
"""Argument of `create_model_card` -> argument of `write_card`; `dataset_name` is TRL's."""
_CARD = {"language", "license", "tags", "model_name", "task", "base_model", "datasets", "data", "split"}


def card_options(model: nn.Module, repository: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create_model_card` for a push: those given, the repository's name, the model's tags."""
    tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or [])
    tags += [tag for tag in getattr(model, "model_tags", None) or [] if tag not in tags]
    name = given.get("model_name") or repository.rpartition("/")[2]
    return {**given, "model_name": name, **({"tags": tags} if tags else {})}


def run_of(
    trainer: Trainer, model: nn.Module, data: str | None = None, split: str | None = None, datasets: Iterable[str] = ()
) -> Run:
    """The facts of a Trainer's run. Default names of the data: those of the metrics and the datasets."""
    named = [name for name in datasets if is_repository(name)]
    trained, evaluated = _source(trainer.train_dataset), _source(trainer.eval_dataset)
    found = [source[0] for source in (trained, evaluated) if source is not None]
    scores = final_scores(trainer)
    for score in scores:
        score.data = data or score.data
        score.split = split
        if evaluated is not None and score.dataset is None:
            score.dataset, score.revision = evaluated
        elif len(named) == 1:
            score.dataset = named[0]
    return Run(
        scores=scores,
        settings={name: value for name, value in settings_of(trainer, model).items() if value},
        versions=versions_of(trainer, model),
        command=command_line(sys.argv, sys.orig_argv, trainer.args.world_size),
        datasets=list(dict.fromkeys([*named, *([] if named else found)])),
    )


# Results -------------------------------------------------------------------------------------------------------------


def final_scores(trainer: Trainer) -> list[Score]:
    """The evaluation of the current weights; if there was none, the last evaluation, with its step."""
    history: list[dict[str, Any]] = trainer.state.log_history
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    after = history[ends[-1] + 1 :] if ends else []
    best = trainer.state.best_global_step if ends and trainer.args.load_best_model_at_end else None
    step = best or trainer.state.global_step
    groups = [after, [entry for entry in history if entry.get("step") == step]]
    for entries in groups:
        scores = _scores_in(entries)
        if scores:
            return scores
    steps = [entry.get("step") for entry in history if _prefixes(entry)]
    last = steps[-1] if steps else None
    return _scores_in([entry for entry in history if entry.get("step") == last], last) if steps else []


def _scores_in(entries: Iterable[Mapping[str, Any]], step: int | None = None) -> list[Score]:
    """The last evaluation of each prefix."""
    found: dict[str, list[Score]] = {}
    for entry in entries:
        for prefix in _prefixes(entry):
            found[prefix] = scores_of(entry, prefix, data=prefix, step=step)
    return [score for scores in found.values() for score in scores]


def _prefixes(entry: Mapping[str, Any]) -> list[str]:
    names = [key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")]
    return [name for name in names if name != "train"]


# Settings ------------------------------------------------------------------------------------------------------------


def settings_of(trainer: Trainer, model: nn.Module) -> dict[str, str]:
    """Label -> value of each setting of the run; unused settings are empty."""
    args, state = trainer.args, trainer.state
    ended: dict[str, Any] = next((e for e in reversed(state.log_history) if "train_runtime" in e), {})
    trainable, total = trainable_parameters(model)
    share = f"{trainable:,} of {total:,} parameters ({100 * trainable / max(1, total):.3g} %)"
    per_device = train_batch_size(trainer)
    parts = [
        (per_device, "per device"),
        (args.gradient_accumulation_steps, "accumulation steps"),
        (args.world_size, "processes"),
    ]
    rows = math.prod(count for count, _ in parts)
    factors = " × ".join(f"{count} {what}" for count, what in parts if count > 1 or what == "per device")
    mixed, base = "bf16" if args.bf16 else "fp16" if args.fp16 else "", base_precision(model)
    warmup = args.warmup_steps
    schedule = getattr(args.lr_scheduler_type, "value", str(args.lr_scheduler_type))
    rows_trained, longest = trainer.train_dataset, getattr(args, "max_length", None)
    ratio, head = getattr(args, "loraplus_lr_ratio", None), getattr(args, "head_learning_rate", None)
    settings = {
        "Trained": share,
        "Learning rate": f"{args.learning_rate:g}",
        "Learning rate of B": f"{ratio * args.learning_rate:g}" if ratio else "",
        "Learning rate of the heads": f"{head:g}" if head else "",
        "Learning rate of LoRA-Muon": f"{muon:g}" if (muon := getattr(args, "muon_learning_rate", None)) else "",
        "Moving average": f"of the weights, decay {ema:g}" if (ema := getattr(args, "ema", 0.0)) else "",
        "Schedule": f"{schedule}, warmup of {_steps(warmup)}" if warmup else schedule,
        "Optimizer": getattr(args.optim, "value", str(args.optim)),
        "Weight decay": f"{args.weight_decay:g}" if args.weight_decay else "",
        "Maximum gradient norm": f"{args.max_grad_norm:g}" if args.max_grad_norm else "",
        "Label smoothing": f"{args.label_smoothing_factor:g}" if args.label_smoothing_factor else "",
        "Batch": f"{rows} row{'s' if rows > 1 else ''}" + (f" ({factors})" if rows != per_device else ""),
        "Epochs": f"{state.epoch:.4g}" if state.epoch else "",
        "Steps": f"{state.global_step:,}" if state.global_step else "",
        "Rows trained on": f"{len(rows_trained):,}" if isinstance(rows_trained, Sized) else "",
        "Maximum row length": f"{longest:,} tokens" if longest else "",
        "Packed": "yes" if getattr(args, "packing", False) else "",
        "Seed": str(args.seed),
        "Precision": f"{mixed} autocast, base in {base}" if mixed else f"base in {base}",
        "Hardware": _hardware(args),
        "Time": _seconds(ended.get("train_runtime")),
        "Mean training loss": f"{ended['train_loss']:.4g}" if "train_loss" in ended else "",
    }
    if not state.global_step:  # without training, only these apply
        settings = {name: settings[name] for name in ("Trained", "Precision", "Hardware")}
    return settings


def versions_of(trainer: Trainer, model: nn.Module) -> dict[str, str]:
    """Library -> version, for the libraries used in the run that `hf_lora.json` does not list."""
    bases = {cls.__module__.partition(".")[0] for cls in type(trainer).__mro__}
    data = {type(part).__module__.partition(".")[0] for part in (trainer.train_dataset, trainer.eval_dataset)}
    used = {
        "accelerate": True, "trl": "trl" in bases, "datasets": "datasets" in data,
        **dict.fromkeys(libraries_of(model), True),
        "deepspeed": trainer.is_deepspeed_enabled,
    }  # fmt: skip
    found = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name, is_used in used.items() if is_used}
    if trainer.args.device.type == "cuda" and torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def _hardware(args: TrainingArguments) -> str:
    device = args.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        count = max(args.world_size, args.n_gpu)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''}" + (
            f", {args.world_size} processes)" if args.world_size > 1 else ")"
        )
    else:
        name, count = device.type, args.world_size
    return f"{count} × {name}" if count > 1 else name


def _seconds(time: float | None) -> str:
    return "" if time is None else f"{time:,.0f} s" if time >= 10 else f"{time:.2g} s"


def _steps(warmup: float) -> str:
    """Trainer's warmup is a fraction of all steps or a number of steps."""
    return f"{100 * warmup:g} % of the steps" if warmup < 1 else f"{warmup:g} steps"


def _source(data: object) -> tuple[str, str] | None:
    """(repository, commit) of a dataset from the Hub, from the URLs of its files."""
    files = getattr(getattr(data, "info", None), "download_checksums", None)
    found = {match.groups() for url in files or () if (match := _ON_HUB.match(str(url)))}
    only = found.pop() if len(found) == 1 else None
    return (only[0], only[1]) if only is not None else None


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list | tuple) else value
