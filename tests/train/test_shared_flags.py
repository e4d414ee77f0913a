"""Parsers of our arguments together with another dataclass that defines LoRA flags too, as published scripts have."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_llama
from transformers import HfArgumentParser

from hf_lora import LoraTrainer, LoraTrainingArguments
from hf_lora.errors import ConfigError
from hf_lora.train.arguments import LoraArguments


@dataclasses.dataclass
class ModelArguments:
    """A script's own, with other defaults."""

    model: str = "base"
    lora_r: int = 64
    lora_alpha: int = 16
    lora_target_modules: list[str] | None = None


def parsers() -> Iterator[tuple[Any, type, type]]:
    """(parser, another class with LoRA flags, ours), for transformers' and TRL's parsers."""
    yield HfArgumentParser, ModelArguments, LoraTrainingArguments
    trl = pytest.importorskip("trl", reason="the extra chat is not installed")
    from hf_lora import LoraSFTConfig

    @dataclasses.dataclass
    class LoraDPOConfig(LoraArguments, trl.DPOConfig):
        pass

    for parser, ours in (
        (HfArgumentParser, LoraSFTConfig),
        (trl.TrlParser, LoraSFTConfig),
        (trl.TrlParser, LoraDPOConfig),
    ):
        yield parser, trl.ModelConfig, ours


def test_the_other_class_keeps_the_flags_that_both_define(tmp_path: Path) -> None:
    for make, other, ours in parsers():
        for types in ((ours, other), (other, ours)):
            words = [
                "--output_dir", str(tmp_path), "--lora_r", "32", "--lora_target_modules", "q_proj", "v_proj",
                "--loraplus_lr_ratio", "4", "--use_cpu", "--report_to", "none",
            ]  # fmt: skip
            parser = make(types)
            found = dict(zip(types, parser.parse_args_into_dataclasses(words), strict=True))
            assert (found[other].lora_r, found[other].lora_target_modules) == (32, ["q_proj", "v_proj"])
            args = found[ours]
            assert type(args) is ours
            assert args.lora_config() == LoraArguments().lora_config()
            assert args.loraplus_lr_ratio == 4
            assert {"lora_r", "lora_target_modules"} <= {*args.parsed_elsewhere}
            for name in args.to_dict().keys() & dataclasses.asdict(LoraArguments()).keys() - {"loraplus_lr_ratio"}:
                assert getattr(args, name) == getattr(LoraArguments(), name), name
            if "<locals>" not in ours.__qualname__:
                assert pickle.loads(pickle.dumps(args)) == args
            values = {"lora_r": 5, "output_dir": str(tmp_path), "use_cpu": True}
            assert parser.parse_dict(values)[types.index(other)].lora_r == 5


def test_alone_they_are_flags_as_before(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--lora_r", "32"]
    for types in (LoraTrainingArguments, [LoraTrainingArguments], (LoraTrainingArguments,)):
        (args,) = HfArgumentParser(types).parse_args_into_dataclasses(words)
        assert args.lora_r == 32
        assert args.parsed_elsewhere == ()


def test_a_run_without_the_other_classs_values_says_so(tmp_path: Path, messages: list[str]) -> None:
    words = ["--output_dir", str(tmp_path), "--lora_r", "12", "--use_cpu", "--report_to", "none"]
    args, other = HfArgumentParser((LoraTrainingArguments, ModelArguments)).parse_args_into_dataclasses(words)
    LoraTrainer(tiny_llama(), args)
    assert any("The flags lora_alpha, lora_r, lora_target_modules are those of another class" in m for m in messages)
    messages.clear()
    model = tiny_llama()
    trainer = LoraTrainer(model, args, lora_config={"r": other.lora_r})
    assert trainer.model.lora_configs["default"].r == 12
    assert not [m for m in messages if "another class" in m]


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj"]])
def test_projections_of_gradients_are_refused(modules: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    args = LoraTrainingArguments(str(tmp_path), optim="galore_adamw", optim_target_modules=modules, use_cpu=True)
    with pytest.raises(ConfigError, match=r"optim_target_modules=.* chooses linear layers") as caught:
        LoraTrainer(model, args)
    assert not hasattr(model, "lora_configs")
    assert "such as adamw_torch" in str(caught.value)
    LoraTrainer(model, dataclasses.replace(args, optim_target_modules=None, optim="adamw_torch"))
