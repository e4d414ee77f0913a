"""A script for transformers 4 changes one import and runs: its arguments are translated, each with one warning."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from tiny import sentences, tiny_bert
from transformers import HfArgumentParser, TrainingArguments

from hf_lora import ConfigError, LoraSeq2SeqTrainingArguments, LoraTrainer, LoraTrainingArguments
from hf_lora.train.former_names import FLAGS, REMOVED, RENAMED, current_names

Make = Callable[..., Any]
FORMER: dict[str, Any] = {
    "evaluation_strategy": "steps", "no_cuda": True, "per_gpu_train_batch_size": 3, "per_gpu_eval_batch_size": 5,
    "push_to_hub_token": "secret", "push_to_hub_model_id": "me/it", "warmup_ratio": 0.25, "adafactor": True,
    "group_by_length": True, "include_inputs_for_metrics": True, "use_mps_device": False, "overwrite_output_dir": True,
    "save_safetensors": False, "fp16_backend": "auto", "half_precision_backend": "auto",
    "use_ipex": False, "jit_mode_eval": False, "ray_scope": "last", "include_tokens_per_second": False,
}  # fmt: skip
PRESENT: dict[str, Any] = {
    "eval_strategy": "steps", "use_cpu": True, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5,
    "hub_token": "secret", "hub_model_id": "me/it", "warmup_steps": 0.25, "optim": "adafactor",
    "train_sampling_strategy": "group_by_length", "include_for_metrics": ["inputs"],
}  # fmt: skip


@pytest.mark.parametrize("cls", [LoraTrainingArguments, LoraSeq2SeqTrainingArguments])
def test_former_names_have_their_present_meaning(cls: Any, messages: list[str]) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    former = {name: value for name, value in FORMER.items() if name not in known}
    assert {*RENAMED, *FLAGS, *REMOVED} - {"max_seq_length", "use_liger", "tokenizer"} == FORMER.keys()
    found, expected = cls("out", report_to="none", **former), cls("out", report_to="none", **PRESENT)
    different = [f.name for f in dataclasses.fields(cls) if getattr(found, f.name) != getattr(expected, f.name)]
    assert different == []
    for name in former:
        assert sum(f": {name}" in text for text in messages) == 1, name


@pytest.mark.parametrize("cls", [LoraTrainingArguments, LoraSeq2SeqTrainingArguments])
def test_former_flags_have_their_present_meaning_on_a_command_line(cls: Any) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    words = ["--output_dir", "out", "--report_to", "none"]
    for name, value in FORMER.items():
        if name not in known:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    [found] = HfArgumentParser(cls).parse_args_into_dataclasses(words)
    expected = cls("out", report_to="none", **PRESENT)
    different = [f.name for f in dataclasses.fields(cls) if getattr(found, f.name) != getattr(expected, f.name)]
    assert different == []
    assert not found.overwrite_output_dir  # scripts read it
    assert found.save_safetensors  # sentence-transformers reads it
    assert not {"overwrite_output_dir", "save_safetensors"} & set(
        re.findall(r"\w+", HfArgumentParser(cls).format_help())
    )
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is cls
    assert again.to_dict() == found.to_dict()


def test_a_flag_that_is_off_changes_nothing() -> None:
    found = LoraTrainingArguments("out", report_to="none", adafactor=False, group_by_length=False)
    assert found.optim == LoraTrainingArguments("out", report_to="none").optim


def test_the_folder_of_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    LoraTrainingArguments("out", report_to="none", logging_dir="logs/here")
    assert os.environ.pop("TENSORBOARD_LOGGING_DIR") == "logs/here"


def test_unknown_and_doubled_names_are_errors() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        LoraTrainingArguments("out", no_such_argument=1)
    with pytest.raises(ConfigError, match=r"(?s)evaluation_strategy is the former name.*no_cuda is the former name"):
        current_names(
            {"evaluation_strategy": "no", "eval_strategy": "no", "no_cuda": True, "use_cpu": True},
            lambda name: name in ("eval_strategy", "use_cpu"), "call",
        )  # fmt: skip


def test_a_trainer_takes_its_tokenizer(arguments: Make, messages: list[str]) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None: ...

    tokenizer = Tokenizer()
    trainer = LoraTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=sentences(), tokenizer=tokenizer)
    assert trainer.processing_class is tokenizer
    assert any("tokenizer" in text and "processing_class" in text for text in messages)
    with pytest.raises(TypeError, match="no_such_argument"):
        LoraTrainer(tiny_bert(), arguments(max_steps=1), no_such_argument=1)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("perplexity", False), ("eval_perplexity", False), ("eval_loss", False), ("accuracy", True), ("eval_f1", True)],
)
def test_the_best_perplexity_is_the_lowest(metric: str, greater: bool, arguments: Make) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    assert arguments(metric_for_best_model=metric, **options).greater_is_better is greater
    assert arguments(metric_for_best_model=metric, greater_is_better=True, **options).greater_is_better is True
