"""The arguments of `hf-lora train` as dataclasses: flags, which override a YAML file.

A script calls `finetune` with the same names: `finetune({"model": …, "train_file": …})`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError, Faults, LoraError, nearest
from ..tasks.base import Defaults, Task
from ..tasks.causal_lm import CausalLM
from ..tasks.registry import TASKS
from .arguments import LoraTrainingArguments, flag

DEFAULTS: dict[str, Any] = {
    "output_dir": "hf_lora_run",
    "warmup_steps": 0.06,  # a fraction of all steps
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": ["none"],
    "hub_strategy": "end",
}
"""Defaults that differ from Trainer's, which are meant for long runs of large models; a push is one commit."""
INTERVALS = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}
"""Number of steps -> its strategy, which is `steps` if only the number is given."""
ELSEWHERE = {
    "base_model": "model", "batch_size": "per_device_train_batch_size", "eval_data": "eval_file",
    "lora_rank": "lora_r", "lr": "learning_rate", "max_seq_length": "max_length", "model_name": "model",
    "model_name_or_path": "model", "r": "lora_r", "rank": "lora_r", "train_batch_size": "per_device_train_batch_size",
    "train_data": "train_file", "validation_file": "eval_file",
}  # fmt: skip
"""Name of an option in other tools -> the name here, which is not the one that is spelled most like it."""
PACKED = "packed causal-lm"
TASK_DEFAULTS: dict[str, Defaults] = {name: task.defaults for name, task in TASKS.items()} | {PACKED: CausalLM.packed}
"""Defaults by task. Models that are not language models are usually small, and need a higher rate."""


CHOSEN = {
    "lora_r": "8; 32 for text and multi-label classification, 64 for causal-lm",
    "lora_alpha": "2 r; r for text and multi-label classification and, up to 64, causal-lm",
    "lora_bias": "none; all for text and multi-label classification",
    "loraplus_lr_ratio": "1; 4 for text and multi-label classification, and causal-lm with AdamW up to width 1,024",
    "muon_learning_rate": "AdamW; 0.008 for causal-lm up to a width of 1,024, if no setting of AdamW is given",
    "head_learning_rate": "learning_rate; 3 times as much for text and multi-label classification",
    "num_train_epochs": "3; up to 20 for text and multi-label classification with few rows",
    "train_sampling_strategy": "random; group_by_length for text and multi-label classification",
    "eval_strategy": "no; epoch with --eval-file",
}
"""Option -> its default where it depends on the task or the data, see `train.defaults`."""


def defaults_of(task: Task, packing: bool) -> Defaults:
    """The defaults of a run."""
    return TASK_DEFAULTS[PACKED if isinstance(task, CausalLM) and packing else task.name]


@dataclass
class RunArguments:
    """Model and data; the other arguments are in `LoraTrainingArguments`."""

    model: str | None = flag(None, "Folder or Hub name of the base model.")
    model_revision: str | None = flag(None, "Branch, tag or commit of the base model.")
    dtype: str | None = flag(None, "Dtype of the frozen weights, such as bfloat16. Default: the checkpoint's.")
    load_in_4bit: bool = flag(
        False, "Quantize the frozen linear layers to 4 bits (NF4 with double quantization) when they are loaded."
    )
    load_in_8bit: bool = flag(False, "Quantize the frozen linear layers to 8 bits when they are loaded.")
    task: str | None = flag(None, f"One of {', '.join(TASKS)}. Default: inferred from the columns.")
    train_file: str | None = flag(None, "CSV, TSV, JSON, JSONL or parquet file, or a folder of images.")
    eval_file: str | None = flag(None, "File for evaluations during training, by default after each epoch.")
    test_file: str | None = flag(None, "File for the final evaluation.")
    dataset: str | None = flag(None, "Name for datasets.load_dataset, instead of files.")
    dataset_config: str | None = flag(None, "Configuration of the dataset.")
    train_split: str = flag("train", "Dataset split to train on.")
    eval_split: str | None = flag(None, "Split for evaluations during training, by default after each epoch.")
    test_split: str | None = flag(None, "Split for the final evaluation.")
    text_column: str | None = flag(None, "Column of texts, prompts, questions, lists of words, or images.")
    pair_column: str | None = flag(None, "Column of the second text of a pair, or of the contexts of questions.")
    label_column: str | None = flag(None, "Column of labels, lists of labels or tags, or answers in a context.")
    label_columns: list[str] | None = flag(
        None, "Columns of 0 and 1, one for each class (multi-label-classification)."
    )
    completion_column: str | None = flag(
        None, "Column of answers, trained on after the prompt (causal-lm), or of the texts to write (seq2seq-lm)."
    )
    max_length: int | None = flag(
        None,
        "Maximum tokens per text and per packed row. Default: at most 512, 384 for question-answering, or 1024 "
        "for causal-lm.",
    )
    max_target_length: int | None = flag(None, "Maximum tokens of the texts to write (seq2seq-lm). Default: 128.")
    source_prefix: str | None = flag(
        None, "Text before every source, such as 'summarize: ' (seq2seq-lm); kept with the adapter."
    )
    packing: bool = flag(
        True, "Pack several texts into one row of max_length tokens, without attention between them (causal-lm)."
    )
    use_chat_template: bool | None = flag(
        None,
        "Whether pairs of texts are turns of a chat (causal-lm). Default: yes if the tokenizer has a template, except "
        "for columns named prompt and completion, which are concatenated.",
    )
    last_turn_only: bool = flag(False, "Train only on the assistant's last turn of each chat (causal-lm).")
    beta: float | None = flag(
        None, "How strongly the model is held to its reference (dpo, kto): higher, closer. Default: 0.1."
    )
    problem_type: str | None = flag(
        None,
        "single_label_classification, multi_label_classification, or regression (the labels are numbers). Default: "
        "classification, if the labels look like classes.",
    )
    pooling: str | None = flag(
        None,
        "How the tokens of a text become the vector that a classifier reads: mean, cls, max, last, another mode of "
        "sentence-transformers, or own (as its class in transformers does). Default: as the checkpoint declares, else "
        "own.",
    )
    head_init: str = flag(
        "class-means",
        "How a new head of a single-label classifier starts: class-means (at the means of its feature over each "
        "class, in one pass before training) or random.",
        choices=["class-means", "random"],
    )
    search_learning_rate: bool = flag(
        False,
        "Choose the learning rate among five around the default by successive halving on held-out rows, for about the "
        "price of another run; the same as --learning-rate auto.",
    )
    verbose: bool = flag(False, "Also list every adapted layer before training.")
    overwrite: bool = flag(
        False,
        "Replace the adapter and the checkpoints of an earlier run in output_dir. The adapter stays until the new one "
        "is complete. No effect with resume_from_checkpoint.",
    )


@dataclass
class Parsed:
    """The arguments of a command line and its YAML file."""

    run: RunArguments
    training: LoraTrainingArguments
    given: frozenset[str]
    """Names of the arguments that were set explicitly."""


def known_arguments() -> frozenset[str]:
    """The names of all arguments of `hf-lora train`."""
    classes = (RunArguments, LoraTrainingArguments)
    return frozenset(f.name for cls in classes for f in dataclasses.fields(cls) if f.init)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument --\w+/(?=--)", "argument ", message).rstrip(".")
        raise ConfigError(f"hf-lora train: {message}. `hf-lora train --all-options` describes every argument.")


def argument_parser() -> HfArgumentParser:
    """The parser of `RunArguments` and `LoraTrainingArguments`, with `DEFAULTS`."""
    classes: Any = (RunArguments, LoraTrainingArguments)
    usage = "hf-lora train [--config FILE] [--NAME VALUE ...]"
    parser = _Parser(classes, prog="hf-lora train", usage=usage, allow_abbrev=False, add_help=False)
    parser.set_defaults(**DEFAULTS)
    return parser


def describe_arguments() -> str:
    """Every argument with its default, which may depend on the task."""
    text = argument_parser().format_help()
    for name in (f.name for f in dataclasses.fields(Defaults)):
        values: dict[str, list[str]] = {}
        for task, defaults in TASK_DEFAULTS.items():
            by_width = name == "learning_rate" and (task in (CausalLM.name, PACKED) or TASKS[task].pools)
            values.setdefault("by the width" if by_width else f"{getattr(defaults, name):g}", []).append(task)
        found = "; ".join(f"{value} for {', '.join(tasks)}" for value, tasks in values.items())
        text = _with_default(text, name, found)
    for name, found in CHOSEN.items():
        text = _with_default(text, name, found)
    return text


def _with_default(text: str, name: str, default: str) -> str:
    """The help text, with what it says of an option's default replaced."""
    listed = re.search(rf"--{name} .*?\(default:\s+([^)]*)\)", text, re.DOTALL)
    return text if listed is None else text[: listed.start(1)] + default + text[listed.end(1) :]


def parse_arguments(argv: Sequence[str], config: str | os.PathLike[str] | Mapping[str, Any] | None = None) -> Parsed:
    """Parse flags, which override a YAML file.

    Args:
        argv: flags such as `--lora-r 16`; `-` and `_` in a name are equivalent.
        config: a YAML file with a mapping of names to values, or such a mapping.

    Raises:
        ConfigError: a name is unknown (the message suggests a similar one), or a value is invalid.
    """
    parser = argument_parser()
    known = known_arguments()
    values = config if isinstance(config, Mapping) else _read_yaml(config) if config is not None else {}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    faults = Faults("finetune(…)" if isinstance(config, Mapping) else f"hf-lora train --config {config}")
    for name in values:
        if name not in known:
            faults.add(f"{name} is not an argument{_suggestion(name, known)}")
    faults.check(ConfigError, "Correct these lines; `hf-lora train --all-options` lists every argument.")
    empty = {name: value for name, value in values.items() if value == []}  # argparse has no flag for an empty list
    parser.set_defaults(**empty)
    # An interval on the command line overrides the file's strategy too, which would leave it without effect.
    replaced = {INTERVALS[name] for name in _intervals_other_than_0(argv)} - _names_in(argv, known)
    lines = [w for name, value in values.items() if name not in replaced for w in _flag_with(name, value)]
    words = _with_search([*lines, *argv])
    named = _names_in(words, known)
    if named & {"eval_file", "eval_split"} and not named & {"eval_strategy", "evaluation_strategy"}:
        parser.set_defaults(eval_strategy="epoch")
    parser.set_defaults(**{INTERVALS[name]: "steps" for name in _intervals_other_than_0(words)})
    try:
        parsed = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except LoraError:
        raise
    except FileNotFoundError as error:
        option = next((word for word, value in itertools.pairwise(words) if value == str(error.filename)), "")
        raise ConfigError(f"hf-lora train: {option} {error.filename} does not exist.".replace("  ", " ")) from error
    except Exception as error:  # TrainingArguments found a conflict, an unknown value or a missing package
        if "load_best_model_at_end requires" in str(error):
            raise ConfigError(
                "hf-lora train: --load-best-model-at-end needs an evaluation at every save. Pass --eval-file FILE "
                "--eval-strategy epoch, or the same --eval-strategy as --save-strategy."
            ) from error
        raise ConfigError(f"hf-lora train: {error}") from error
    run, training, rest = parsed[0], parsed[1], parsed[-1]
    faults = Faults("hf-lora train")
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            faults.add(f"{word} is not an argument{_as_flags(_suggestion(name, known))}")
        elif not faults.found:  # after an unknown name, it is its value
            faults.add(f"{word} is not an argument: names start with --")
    faults.check(ConfigError, "Correct these; `hf-lora train --all-options` lists every argument.")
    return Parsed(run, training, frozenset(named | set(empty)))


def _names_in(words: Sequence[str], known: Container[str]) -> set[str]:
    """The names of the arguments that words of a command line set; `--no-packing` sets `packing`."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {
        name.removeprefix("no_") if name not in known and name.removeprefix("no_") in known else name for name in names
    }


def _intervals_other_than_0(words: Sequence[str]) -> list[str]:
    """Which of `INTERVALS` are given and are not 0.

    Trainer replaces 0 by another interval where the strategy is `steps`; otherwise it is refused with its name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in INTERVALS:
        parser.add_argument(f"--{name}", as_flag(name), nargs="?", const="")  # what is no number is refused later
    given = vars(parser.parse_known_args(list(words))[0])
    return [name for name, word in given.items() if word is not None and not _is_zero(word)]


def _is_zero(word: str) -> bool:
    try:
        return float(word) == 0
    except ValueError:
        return False


def _with_search(words: Sequence[str]) -> list[str]:
    """The words, with `--learning-rate auto` as its own flag: the value is a number for the parser.

    The last rate counts: a number after `auto`, as on a command line behind a file, takes the flag away.
    """
    found, skip = list[str](), False
    at: int | None = None  # the place of `auto`
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        name, _, value = word.partition("=")
        if skip:
            skip = False
        elif name.replace("-", "_") == "__learning_rate":
            if at is not None:
                del found[at]
            is_auto = (value or following) == "auto"
            at = len(found) if is_auto else None
            found.append("--search_learning_rate=True" if is_auto else word)
            skip = is_auto and not value
        else:
            found.append(word)
    return found


def _read_yaml(config: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = Path(config).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except OSError as error:
        raise ConfigError(f"--config {config} could not be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {config} is not valid YAML ({error}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {config} must consist of lines `name: value`.")
    names = [str(key.value).replace("-", "_") for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--config {config} sets {', '.join(twice)} more than once. Keep one line of each.")
    return values


def plain_values(parsed: Parsed, names: Container[str]) -> dict[str, Any]:
    """Some of the arguments, by name, as JSON and YAML have them."""
    parts = (parsed.run, parsed.training)
    found = {
        f.name: _plain(getattr(part, f.name)) for part in parts for f in dataclasses.fields(part) if f.name in names
    }
    if found.get("report_to") == []:
        found["report_to"] = "none"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value.to_dict() if hasattr(value, "to_dict") else value


def _flag_with(name: str, value: object) -> list[str]:
    """A YAML value as command-line arguments, so that one parser checks both."""
    if value is None or value == []:
        return []
    if isinstance(value, Mapping):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def as_flag(name: str) -> str:
    """The flag of an argument."""
    return f"--{name.replace('_', '-')}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    return f" (did you mean {ELSEWHERE[name]!r}?)" if name in ELSEWHERE else nearest(name, known)


def _as_flags(hint: str) -> str:
    return hint.replace("'", "").replace("you mean ", "you mean --").replace(" or ", " or --").replace("_", "-")
