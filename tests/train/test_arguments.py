"""The LoRA flags: every form that HfArgumentParser reads gives the same LoraConfig."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_lora import LoraConfig, LoraSeq2SeqTrainingArguments, LoraTrainingArguments
from hf_lora.errors import ConfigError
from hf_lora.train.arguments import LoraArguments

FLAGS = [
    "--lora_r", "4", "--lora_alpha", "6", "--lora_dropout", "0.1", "--lora_target_modules", "query", "value",
    "--lora_exclude_modules", "0.query", "--lora_layers_to_transform", "0", "1", "--lora_layers_pattern", "layer",
    "--lora_rank_pattern", '{"value":2}', "--lora_alpha_pattern", '{"value":3.5}', "--lora_use_rslora",
    "--lora_bias", "lora_only", "--lora_modules_to_save", "classifier", "--lora_init", "gaussian",
    "--lora_task_type", "SEQ_CLS", "--lora_use_dora", "--lora_trainable_token_indices", "9", "3",
    "--loraplus_lr_ratio", "8", "--head_learning_rate", "1e-3",
]  # fmt: skip
VALUES: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "lora_target_modules": ["query", "value"],
    "lora_exclude_modules": ["0.query"],
    "lora_layers_to_transform": [0, 1],
    "lora_layers_pattern": ["layer"],
    "lora_rank_pattern": {"value": 2},
    "lora_alpha_pattern": {"value": 3.5},
    "lora_use_rslora": True,
    "lora_bias": "lora_only",
    "lora_use_dora": True,
    "lora_trainable_token_indices": [9, 3],
    "lora_modules_to_save": ["classifier"],
    "lora_init": "gaussian",
    "lora_task_type": "SEQ_CLS",
    "loraplus_lr_ratio": 8,
    "head_learning_rate": 1e-3,
}
CONFIG = LoraConfig(
    r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["query", "value"], exclude_modules=["0.query"],
    layers_to_transform=[0, 1], layers_pattern=["layer"], rank_pattern={"value": 2}, alpha_pattern={"value": 3.5},
    use_rslora=True, bias="lora_only", modules_to_save=["classifier"], init_lora_weights="gaussian",
    task_type="SEQ_CLS", use_dora=True, trainable_token_indices=[9, 3],
)  # fmt: skip


def parse(cls: Any, *flags: str) -> Any:
    return HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *flags])[0]


@pytest.mark.parametrize("cls", [LoraTrainingArguments, LoraSeq2SeqTrainingArguments])
def test_flags(cls: Any) -> None:
    found = parse(cls, *FLAGS)
    assert found.lora_config() == CONFIG
    assert (found.loraplus_lr_ratio, found.head_learning_rate) == (8, 1e-3)


def test_files_and_dicts(tmp_path: Path) -> None:
    values = {"output_dir": "out", "use_cpu": True, **VALUES}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    parser = HfArgumentParser(LoraTrainingArguments)
    for found in (
        parser.parse_dict(values)[0],
        parser.parse_yaml_file(tmp_path / "a.yaml")[0],
        parser.parse_json_file(tmp_path / "a.json")[0],
    ):
        assert found.lora_config() == CONFIG


def test_defaults_are_those_of_the_config() -> None:
    assert parse(LoraTrainingArguments).lora_config() == LoraConfig()
    assert parse(LoraTrainingArguments).changed_lora_fields() == []


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--lora_target_modules", "all-linear"], "target_modules", "all-linear"),
        (["--lora_target_modules", "attention"], "target_modules", "attention"),
        (["--lora_target_modules", "re:.*\\.(query|key)"], "target_modules", ".*\\.(query|key)"),
        (["--lora_target_modules", "query,value"], "target_modules", ["query", "value"]),
        (["--lora-exclude-modules", "re:.*0.*"], "exclude_modules", ".*0.*"),
        (["--lora_modules_to_save", "none"], "modules_to_save", []),
        (["--lora_init", "false"], "init_lora_weights", False),
        (["--lora_init", "true"], "init_lora_weights", True),
    ],
)
def test_forms_of_a_field(flags: list[str], field: str, value: Any) -> None:
    assert getattr(parse(LoraTrainingArguments, *flags).lora_config(), field) == value


def test_yaml_forms() -> None:
    values = {"output_dir": "out", "use_cpu": True, "lora_target_modules": "attention", "lora_init": True}
    found = HfArgumentParser(LoraTrainingArguments).parse_dict(values)[0]
    assert found.lora_config().target_modules == "attention"
    assert found.lora_config().init_lora_weights is True


def test_every_fault_is_listed() -> None:
    with pytest.raises(ConfigError) as error:
        LoraTrainingArguments(
            output_dir="out", use_cpu=True, lora_r=0, lora_dropout=2, lora_target_modules=["re:a", "b"],
            lora_exclude_modules=["all-linear", "x"], lora_rank_pattern="{a", lora_init="maybe", loraplus_lr_ratio=0,
            head_learning_rate=-1, lora_guard_steps=-1,
        )  # fmt: skip
    text = str(error.value)
    for part in (
        "lora_r=0", "lora_dropout=2", "lora_target_modules", "lora_exclude_modules", "lora_rank_pattern",
        "lora_init='maybe'", "loraplus_lr_ratio=0", "head_learning_rate=-1", "lora_guard_steps=-1",
    ):  # fmt: skip
        assert part in text, part


def test_an_alpha_that_trains_nothing_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lora_alpha=0 must be positive"):
        LoraTrainingArguments(output_dir="out", use_cpu=True, lora_alpha=0)
    with pytest.raises(ConfigError, match=r"lora_alpha_pattern\['q_proj'\]=-1 must be positive"):
        LoraTrainingArguments(output_dir="out", use_cpu=True, lora_alpha_pattern='{"q_proj": -1}')


def test_round_trip_through_training_args(tmp_path: Path) -> None:
    before = parse(LoraTrainingArguments, *FLAGS)
    torch.save(before, tmp_path / "training_args.bin")
    after = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(after) is LoraTrainingArguments
    assert after.lora_config() == CONFIG
    assert after.to_dict() == before.to_dict()
    json.dumps(before.to_dict())
    assert dataclasses.replace(before, lora_r=2).lora_config().r == 2


def test_trainers_own_fields_keep_name_default_and_place() -> None:
    theirs = list(dataclasses.fields(TrainingArguments))
    ours = list(dataclasses.fields(LoraTrainingArguments))
    assert [f.name for f in ours[: len(theirs)]] == [f.name for f in theirs]
    assert all(a.default == b.default for a, b in zip(theirs, ours, strict=False))


def test_beside_a_scripts_own_dataclasses() -> None:
    training, lora = HfArgumentParser((TrainingArguments, LoraArguments)).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--lora_r", "2"]
    )
    assert type(training) is TrainingArguments
    assert lora.lora_config() == LoraConfig(r=2)


def test_alora_by_its_name_and_its_tokens() -> None:
    config = LoraTrainingArguments("out", lora_method="alora", lora_alora_invocation_tokens=[5]).lora_config()
    assert (config.method, config.alora_invocation_tokens) == ("alora", [5])
    with pytest.raises(ConfigError, match="lora_alora_invocation_tokens"):
        LoraTrainingArguments("out", lora_method="alora")
