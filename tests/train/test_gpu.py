"""On one GPU: FSDP2 with one process, half precisions and torch.compile, from training to the saved adapter."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file
from tiny import texts, tiny_llama

from hf_lora import LoraTrainer, LoraTrainingArguments, gathered_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(folder: Path, resume: str | None = None, model: Any = None, **values: Any) -> Any:
    values = {
        "report_to": "none", "disable_tqdm": True, "max_steps": 10, "save_steps": 5, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "lora_init": "false", "lora_r": 4,
    } | values  # fmt: skip
    torch.manual_seed(0)
    trainer = LoraTrainer(model or tiny_llama(), LoraTrainingArguments(str(folder), **values), train_dataset=texts())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that a launcher makes for a single process."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    PartialState().destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_fsdp2_with_one_process(tmp_path: Path, one_rank: None, base: torch.dtype) -> None:
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    values = {**fsdp, "bf16": base == torch.bfloat16}
    trainer = train(tmp_path / "whole", model=tiny_llama().to(base), **values)
    assert trainer.is_fsdp_enabled
    assert all(hasattr(p, "to_local") for p in trainer.model.parameters())
    whole = gathered_state(trainer._bare_model)
    folder = tmp_path / "whole" / "checkpoint-5"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2**20
    assert not list(folder.glob("*model_fsdp*"))
    again = train(tmp_path / "resumed", resume=str(folder), model=tiny_llama().to(base), **values)
    for name, value in gathered_state(again._bare_model).items():
        assert value.dtype == torch.float32
        assert relative_error(value, whole[name]) < 1e-4, name


@pytest.mark.parametrize(("precision", "tolerance"), [({}, 1e-3), ({"bf16": True}, 0.05)])
def test_training_follows_that_on_a_cpu(tmp_path: Path, precision: dict[str, bool], tolerance: float) -> None:
    there, here = train(tmp_path / "gpu", **precision), train(tmp_path / "cpu", use_cpu=True)
    assert {p.device.type for p in there.model.parameters()} == {"cuda"}
    assert len(losses(there)) == 10
    assert losses(there) == pytest.approx(losses(here), rel=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_follow_float32(tmp_path: Path, precision: str) -> None:
    full, half = train(tmp_path / "full"), train(tmp_path / "half", **{precision: True})
    trained = [p for p in half.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained)
    for a, b in zip(losses(full), losses(half), strict=True):
        assert math.isclose(a, b, rel_tol=0.05)


def test_a_compiled_model_trains_saves_and_resumes(tmp_path: Path) -> None:
    plain, compiled = train(tmp_path / "plain"), train(tmp_path / "compiled", torch_compile=True)
    for a, b in zip(losses(plain), losses(compiled), strict=True):
        assert math.isclose(a, b, rel_tol=1e-3)
    again = train(tmp_path / "again", resume=str(tmp_path / "compiled" / "checkpoint-5"), torch_compile=True)
    found, expected = (
        load_file(tmp_path / n / "checkpoint-10" / "adapter_model.safetensors") for n in ("again", "compiled")
    )
    assert found.keys() == expected.keys()
    assert not any("_orig_mod" in key for key in found)
    assert all(relative_error(found[key], value) < 1e-4 for key, value in expected.items())
    assert again.state.global_step == 10
