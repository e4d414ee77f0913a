"""The settings of a run that the user left open: what was measured best, by the task, the data and the width.

`LoraTrainer` and `LoraConfig` keep the defaults of Trainer and PEFT; these are for `hf-lora train` and `finetune`. The
measurements are in docs/classifiers.md and docs/language-models.md. `hf-lora recommend` explains them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapt.walk import adapter_layers
from ..apply import apply_lora
from ..tasks.base import Data, Task
from ..tasks.causal_lm import rate_for_width
from ..tasks.registry import CAUSAL_LM
from .arguments import LoraTrainingArguments
from .empty import empty_model, parameters_of_a_rank
from .engines import requested_engine
from .muon import factor_pairs
from .parsing import Parsed
from .schedule import steps_of_epoch

STEPS = 400
"""A classifier's training is repeated until it has so many steps."""
EPOCHS = (3, 20)
"""The fewest and the most epochs that are chosen."""
PACKED_STEPS, MUON_STEPS = 100, 140
"""Rows are packed into shorter ones until a language model's training has so many steps, with AdamW and LoRA-Muon."""
LENGTHS = (1024, 512, 256, 128)
"""The lengths of packed rows that are chosen."""
PLAIN_INITS = ("true", "gaussian", "orthogonal")
NARROW = 1024
"""Up to this width, language models are trained with LoRA-Muon, or with a rate of B that is a multiple of A's."""
MUON = 0.008
"""The rate of LoRA-Muon for language models."""
CLASSIFIER_RANK = 32
RANKS = (64, 256)
"""The lowest and the highest rank that is chosen for a language model."""
FEW_TOKENS = 1_000_000
"""Adapters of the lowest rank have more parameters than that."""
CLASSIFIERS = 384
"""The width of the encoder with which classifiers were measured."""
RATE = 5e-4
"""The rate of A of a classifier of that width; B has 4 times of it."""
HEAD = 3
"""The rate of a classifier's head, relative to that of A."""

_SETTINGS_OF_ADAMW = {
    "learning_rate", "loraplus_lr_ratio", "muon_learning_rate", "optim", "optim_args", "optim_target_modules",
    "adam_beta2", "adam_epsilon",
}  # fmt: skip

_DOUBTS = {
    "classifier": (
        "Compared on Banking77 with one encoder of 23 million parameters (docs/banking77.md), in part on its test "
        "set. The label of a row holds at most log2(classes) bits, so the rank does not limit what is learned."
    ),
    "rates of a classifier": (
        "At the width 384, 3e-4 was best for the sentiment of sentences and 1e-3 for the intents of Banking77, with B "
        "at 4 and the head at 3 times; this is between them. For wider models they fall with the 0.8th power of the "
        "width (LoRA Without Regret), to 2.9e-4 and 2.3e-4 at 768 and 1,024, where the LoRA paper (arXiv:2106.09685) "
        "used 2e-4 to 5e-4. Expect a factor of 2, which --learning-rate auto settles."
    ),
    "epochs": (
        "About 400 steps were enough on Banking77 with 10 examples a class. Without --eval-file nothing tells when "
        "more epochs begin to do harm."
    ),
    "rank": (
        "With at least as many parameters as trained tokens, LoRA loses little against full fine-tuning (LoRA Without "
        "Regret). That is a lower bound, so 64 is the least: on GSM8K it was a little better than 16 (0.764 and 0.778 "
        "nats a token). Lower ranks need less memory."
    ),
    "rates": (
        "1e-3, with B at 4 times, was measured best at the width 576; twice of it was worse (docs/gsm8k.md). Other "
        "widths follow the 0.8th power (LoRA Without Regret) and were not measured here: expect a factor of 2 to 3, "
        "which --learning-rate auto settles. Full fine-tuning needs about a tenth. The rates are for a scaling "
        "alpha / r of 1. Above rank 64 alpha stays 64: whether the best rate depends on the rank depends on the "
        "scaling (arXiv:2602.06204)."
    ),
    "muon": (
        "LoRA-Muon trains the factors, AdamW anything else. Measured at the width 576: short structured answers have "
        "an F1 of 0.687 ± 0.012, where AdamW at 1e-3, with B at 4 times, has 0.649 ± 0.004 (3 seeds); GSM8K 0.734 and "
        "0.738 nats a token (one seed). Half and twice the rate were a little worse. A step takes longer than one of "
        "AdamW, which --learning-rate or --optim chooses."
    ),
    "length": (
        "Short structured answers had an F1 of 0.558, 0.653 and 0.649 after 49, 100 and 213 steps of AdamW, and of "
        "0.616 and 0.687 after 100 and 213 of LoRA-Muon, with shorter rows for more steps. In three passes, 147 steps "
        "were better than 300 with both (0.725 and 0.708; 0.748 and 0.732); on GSM8K, 130 of AdamW than 265 (0.738 "
        "and 0.748 nats a token)."
    ),
}
"""How sure the choices are, for `hf-lora recommend`."""
PASSES = (
    "Three passes made short structured answers better (an F1 of 0.75 instead of 0.69), but learned the answers to "
    "300 problems of GSM8K by heart: 0.844 instead of 0.768 nats a token on others (docs/gsm8k.md). With --eval-file, "
    "the loss after each pass shows it."
)
"""The same for the number of epochs of a language model, which is Trainer's."""


@dataclass(frozen=True)
class Choice:
    """Settings with the reason for them, and how sure it is."""

    values: Mapping[str, Any]
    reason: str
    doubt: str = ""


@dataclass
class Choices:
    """What was chosen for a run; `str()` is a line for the user."""

    made: list[Choice] = field(default_factory=list)

    def __str__(self) -> str:
        return "chosen: " + "; ".join(f"{as_words(c.values)} ({c.reason})" for c in self.made)


def chooses(task: Task) -> bool:
    """Whether settings of this task are chosen from the data and the model."""
    return task.name == CAUSAL_LM or task.pools


def typical(task: Task) -> dict[str, Any]:
    """Settings that are chosen for a small model of a task for which they are chosen; else none."""
    if not chooses(task):
        return {}
    if task.name == CAUSAL_LM:
        return {"lora_r": RANKS[0], "num_train_epochs": 3, "muon_learning_rate": MUON}
    return {"lora_r": CLASSIFIER_RANK, "num_train_epochs": EPOCHS[0], "learning_rate": RATE}


def choose(parsed: Parsed, data: Data) -> Choices:
    """Set what the user left open, and say why. Also the length of packed rows, in `data`."""
    choices, training = Choices(), parsed.training
    for choice in _language_model(parsed, data) if data.task.name == CAUSAL_LM else _classifier(parsed, data):
        open_ = {name: value for name, value in choice.values.items() if name not in parsed.given}
        if training.lora_adapter is not None:  # which has its own configuration
            open_ = {name: value for name, value in open_.items() if not name.startswith("lora_")}
        for name, value in open_.items():
            if name == "max_length":
                data.length = value
            else:
                setattr(training, name, value)
        if open_:
            choices.made.append(Choice(open_, choice.reason, choice.doubt))
    return choices


def _classifier(parsed: Parsed, data: Data) -> list[Choice]:
    if not data.task.pools or data.labels is None:
        return []
    training = parsed.training
    rank = training.lora_r if "lora_r" in parsed.given else CLASSIFIER_RANK
    width = width_of(data) or CLASSIFIERS
    rate, reason = rate_for_classifier(width), f"for the width {width:,}"
    if "learning_rate" in parsed.given:
        rate, reason = training.learning_rate, f"for the rate {training.learning_rate:g}"
    rates: dict[str, Any] = {"learning_rate": rate}
    if bears_rates(training):
        rates |= {"loraplus_lr_ratio": 4, "head_learning_rate": head_rate(rate)}
    choices = [
        Choice(
            {"lora_r": rank, "lora_alpha": rank, "lora_bias": "all"}, "measured best for small encoders",
            _DOUBTS["classifier"],
        ),
        Choice(rates, reason, _DOUBTS["rates of a classifier"]),
        Choice({"train_sampling_strategy": "group_by_length"}, "less padding"),
    ]  # fmt: skip
    steps = steps_of_epoch(training, len(data.rows["train"]), training.train_batch_size * training.world_size)
    epochs = min(max(EPOCHS[0], math.ceil(STEPS / steps)), EPOCHS[1])
    if training.max_steps <= 0 and epochs > EPOCHS[0]:
        choices.append(Choice({"num_train_epochs": epochs}, f"{epochs * steps} steps", _DOUBTS["epochs"]))
    return choices


def head_rate(rate: float) -> float:
    """The default rate of a classifier's head, beside this one of A."""
    return float(f"{HEAD * rate:.1e}")


def rate_for_classifier(width: int) -> float:
    """The default rate of A for a text classifier of this width."""
    return rate_for_width(width, CLASSIFIERS, best=RATE, highest=RATE)


def _language_model(parsed: Parsed, data: Data) -> list[Choice]:
    training, width, tokens = parsed.training, width_of(data), trained_tokens(data)
    rank = training.lora_r if "lora_r" in parsed.given else _rank(parsed, data, tokens)
    choices = [
        Choice({"lora_r": rank, "lora_alpha": min(rank, RANKS[0])}, f"for {tokens:,} trained tokens", _DOUBTS["rank"])
    ]
    has_muon, is_narrow = training.muon_learning_rate is not None, width is not None and width <= NARROW
    if width is not None:
        rates: dict[str, Any] = {"learning_rate": rate_for_width(width)}
        has_muon = has_muon or (is_narrow and _bears_muon(parsed, data))
        if has_muon:
            rates["muon_learning_rate"] = MUON
        elif is_narrow and bears_rates(training):
            rates["loraplus_lr_ratio"] = 4
        choices.append(Choice(rates, f"for the width {width:,}", _DOUBTS["muon" if has_muon else "rates"]))
    if parsed.run.packing and parsed.run.max_length is None and training.max_steps <= 0:
        sizes = {split: [len(ids) for ids in rows["input_ids"]] for split, rows in data.rows.items()}
        total = sum(sizes["train"]) * training.num_train_epochs
        longest = max(max(lengths, default=0) for lengths in sizes.values())
        fitting = [length for length in LENGTHS if longest <= length <= data.length]
        batch = training.train_batch_size * training.world_size
        for length in fitting:
            steps = steps_of_epoch(training, math.ceil(total / length), batch)
            if steps >= (MUON_STEPS if has_muon else PACKED_STEPS) or length == fitting[-1]:
                if length < data.length:
                    choices.append(Choice({"max_length": length}, f"about {steps:,} steps", _DOUBTS["length"]))
                break
    return choices


def _rank(parsed: Parsed, data: Data, tokens: int) -> int:
    if tokens <= FEW_TOKENS or parsed.training.lora_adapter is not None:
        return RANKS[0]
    model = empty_model(data.config, str(parsed.run.model), CAUSAL_LM)
    return rank_for(tokens, parameters_of_a_rank(model, parsed.training.lora_config()))


def rank_for(tokens: int, parameters: int) -> int:
    """The rank of a language model's adapter: doubled until it has as many parameters as there are trained tokens.

    LoRA falls behind full fine-tuning where the data exceed its capacity (Schulman et al. 2025, LoRA Without Regret).

    Args:
        parameters: of each rank, in all layers together.
    """
    rank, highest = RANKS
    while rank < highest and rank * parameters < tokens:
        rank *= 2
    return rank


def trained_tokens(data: Data) -> int:
    """The number of tokens that a language model is trained on in an epoch."""
    rows = data.rows["train"]
    if "labels" not in rows.column_names:
        return sum(map(len, rows["input_ids"]))
    return sum(len(labels) - labels.count(-100) for labels in rows["labels"])


def width_of(data: Data) -> int | None:
    """The width of a model's hidden states; None if its config does not tell."""
    return getattr(data.config.get_text_config(), "hidden_size", None)


def bears_rates(training: LoraTrainingArguments) -> bool:
    """Whether other rates for B and the head were measured: with Adam, and factors that start as usual."""
    if training.muon_learning_rate is not None:
        return False
    return "adam" in str(getattr(training.optim, "value", training.optim)) and training.lora_init in PLAIN_INITS


def _bears_muon(parsed: Parsed, data: Data) -> bool:
    """Whether LoRA-Muon was measured for runs like this: plain LoRA of linear layers, no setting of AdamW given."""
    training, config = parsed.training, parsed.training.lora_config()
    if _SETTINGS_OF_ADAMW & parsed.given or parsed.run.search_learning_rate or not bears_rates(training):
        return False
    if training.lora_adapter is not None or config.method != "lora" or requested_engine(training) is not None:
        return False
    model = empty_model(data.config, str(parsed.run.model), CAUSAL_LM)
    apply_lora(model, config)
    linear = [layer._lora.shape.is_matrix for layer in adapter_layers(model).values()]
    return all(linear) and bool(factor_pairs(model))


def as_words(values: Mapping[str, Any]) -> str:
    """Settings as options of a command line."""
    return " ".join(
        f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )
