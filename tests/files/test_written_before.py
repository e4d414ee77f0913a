"""What version 0.1.0 wrote still loads: adapters, a checkpoint of a run, and a file of arguments.

tests/files/written_by_0 was made once by write_old_adapters.py and stays as it is. The base models are not in it: they
are built from their configurations and filled without random numbers, which differ between versions of PyTorch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_lora import LoraConfig, LoraModel, LoraTrainer, LoraTrainingArguments
from hf_lora.train.parsing import parse_arguments

DATA = Path(__file__).parent / "written_by_0"
NAMES = ["llama", "bert", "gpt2", "resnet", "embedding"]
STEPS = 2
"""Optimizer steps before the checkpoint."""
LONGEST_SUM = 147
"""Terms of the longest sum in any of the models: 3 channels under the ResNet's first kernel of 7 x 7."""
DEPTH = 14
"""Matrix products in a row in the deepest, the BERT: 6 in each of 2 layers, pooler and head."""
TOLERANCE = (LONGEST_SUM * DEPTH) ** 0.5 * torch.finfo(torch.float32).eps
"""Of the norm: every term of every sum is rounded once, and the roundings add up like a random walk."""


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [-0.5, 0.5) from whole-number arithmetic: the same bits everywhere, and without a pattern."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((k * k * 31 + k * (17 + seed * 5) + seed * 101) % 1009).double() / 1009 - 0.5).float().reshape(shape)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter of a base its `numbers`; weights of norms lie about 1."""
    for i, parameter in enumerate(p for _, p in sorted(model.named_parameters())):
        values = numbers(tuple(parameter.shape), seed + i)
        parameter.copy_(values if parameter.dim() > 1 else values / 4)
    for module in model.modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
            module.weight += 1
    return model


def build(entry: Mapping[str, Any]) -> Any:
    """The base model that an entry of expected.json describes."""
    cls = getattr(transformers, entry["class"])
    return fill(cls(cls.config_class(**entry["config"])), entry["seed"]).eval()


def inputs_of(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    if "pixels" in entry:
        return {"pixel_values": numbers(tuple(entry["pixels"]), 0)}
    return {"input_ids": torch.tensor(entry["input_ids"])}


@torch.no_grad()
def output_of(model: Any, entry: Mapping[str, Any]) -> Tensor:
    """The logits, of language models at the last place."""
    logits = model.eval()(**inputs_of(entry)).logits
    return logits[:, -1] if logits.dim() == 3 else logits


class Rows(Dataset):  # type: ignore[type-arg]
    """Six labeled texts, which are one batch: in whatever order a sampler gives them, a step is the same."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.tensor([(i * 7 + k * k + 3) % 40 for k in range(8)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 3)}


def trainer_of(model: Any, output_dir: str) -> Any:
    """The run whose checkpoint after `STEPS` steps is kept; it has one step more."""
    args = LoraTrainingArguments(
        output_dir=output_dir, max_steps=STEPS + 1, save_steps=STEPS, per_device_train_batch_size=len(Rows()),
        learning_rate=1e-2, weight_decay=0.1, loraplus_lr_ratio=4.0, lora_r=3, lora_target_modules=["query", "dense"],
        lora_modules_to_save=["classifier"], lora_bias="lora_only", lora_task_type="SEQ_CLS", use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return LoraTrainer(model, args, train_dataset=Rows())


EXPECTED: dict[str, Any] = (
    json.loads((DATA / "expected.json").read_text(encoding="utf-8")) if (DATA / "expected.json").is_file() else {}
)


def assert_output(model: Any, entry: Mapping[str, Any], key: str = "output", tolerance: float = TOLERANCE) -> None:
    error = relative_error(output_of(model, entry), torch.tensor(entry[key]))
    assert error <= tolerance, f"relative error {error:.2e} of {tolerance:.2e}"


def assert_same_files(found: Path, expected: Path) -> None:
    """The tensors to the bit, and the configuration as JSON."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    config, before = (
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (found, expected)
    )
    assert config == before


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def entry(name: str) -> dict[str, Any]:
    return dict(EXPECTED[name])


@pytest.fixture
def model(name: str, entry: dict[str, Any]) -> Any:
    """The adapter on its base again."""
    base = build(entry)
    assert_output(base, entry, "base")
    assert relative_error(output_of(base, entry), torch.tensor(entry["output"])) > 0.05, "the adapter must act"
    return LoraModel.from_pretrained(DATA / name, base_model=base)


def test_an_adapter_computes_what_it_did(model: Any, entry: dict[str, Any]) -> None:
    assert_output(model, entry)
    if "id2label" in entry:  # the rebuilt base has no names for its labels
        assert {str(k): v for k, v in model.config.id2label.items()} == entry["id2label"]
    assert_output(model.unload(), entry, "base")


def test_an_adapter_loads_beside_another(model: Any, name: str, entry: dict[str, Any]) -> None:
    model.load_adapter(DATA / name, "second")
    assert model.active_adapters() == ["second"]
    model.delete_adapter("default")
    assert_output(model, entry)


def test_an_adapter_is_saved_as_it_was(model: Any, name: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert_same_files(tmp_path, DATA / name)


def test_an_adapter_merges(model: Any, name: str, entry: dict[str, Any]) -> None:
    plain = model.merge_and_unload(untie=name == "gpt2")  # the adapted embedding is the output head too
    assert type(plain) is getattr(transformers, entry["class"])
    assert_output(plain, entry)


def test_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    """To what the first run came to. Adam divides a gradient by its size: one near 0 has lost half of its digits."""
    entry = EXPECTED["run"]
    folder = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(DATA / folder.name, folder)
    assert_output(LoraModel.from_pretrained(folder, base_model=build(entry)), entry, "at_checkpoint")
    trainer = trainer_of(build(entry), str(tmp_path))
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == STEPS + 1
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    assert relative_error(torch.tensor(entry["at_checkpoint"]), torch.tensor(entry["output"])) > 20 * tolerance
    assert_output(trainer.model, entry, tolerance=tolerance)


def test_a_file_of_arguments_is_read() -> None:
    parsed = parse_arguments([], DATA / "train.yaml")
    assert (parsed.run.model, parsed.run.train_file, parsed.run.task) == ("base", "train.csv", "text-classification")
    assert parsed.run.max_length == 64
    training = parsed.training
    assert (training.output_dir, training.learning_rate, training.max_steps) == ("adapter", 3e-3, 20)
    assert (training.loraplus_lr_ratio, training.head_learning_rate) == (4.0, 1e-3)
    assert (training.frozen_head_loss, training.share_inputs, training.keep_freed_memory) == (False, False, True)
    assert (training.lora_guard_steps, training.nonfinite) == (2, "skip")
    assert training.lora_config() == LoraConfig(
        r=4, lora_alpha=12.0, lora_dropout=0.1, target_modules=["query", "value"], exclude_modules=["pooler"],
        layers_to_transform=[0, 1], layers_pattern=["layer"], rank_pattern={"query": 2}, alpha_pattern={"value": 3.0},
        use_rslora=True, bias="lora_only", modules_to_save=["classifier"], init_lora_weights="gaussian",
        task_type="SEQ_CLS",
    )  # fmt: skip


def test_no_path_of_the_writer_is_in_the_files() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        content = path.read_bytes()
        assert not [mark for mark in (b"/home/", b"/tmp/", b"/work/", b"/root/") if mark in content], path
