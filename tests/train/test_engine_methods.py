"""Each method under FSDP2 and ZeRO with one process: the numbers, and the file, of a run without an engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, tiny_llama
from methods_worker import CONFIGS, rows, train
from processes import run_processes
from safetensors.torch import load_file

from hf_lora import LoraModel, LoraTrainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("methods_worker.py")
ENGINES = ("fsdp", "zero2", "zero3")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single")
    torch.set_num_threads(1)
    for name in CONFIGS:
        train(LoraTrainer, name, out)
    return out


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    if request.param != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'hf_lora[deepspeed]')")
    out = tmp_path_factory.mktemp(request.param)
    run_processes(WORKER, request.param, out, processes=1)
    return request.param, out


@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_trains_each_method_as_none_does(name: str, engine: tuple[str, Path], single: Path) -> None:
    _, folder = engine
    found, expected = (load_file(out / name / "end-0.safetensors") for out in (folder, single))
    assert found.keys() == expected.keys() != set()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 32 * torch.finfo(torch.float32).eps * value.norm() + 1e-6, key
    ids = rows()[0]["input_ids"][None]
    outputs = []
    for out in (folder, single):
        model = LoraModel.from_pretrained(out / name / "checkpoint-8", base_model=tiny_llama())
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert torch.allclose(*outputs, atol=1e-4)
    assert not torch.allclose(outputs[0], tiny_llama()(ids).logits, atol=1e-2)


def test_two_processes_choose_the_same_ranks_and_values(tmp_path: Path) -> None:
    run_processes(WORKER, "ddp", tmp_path)
    for name in ("eva", "corda"):
        first, second = (load_file(tmp_path / name / f"end-{rank}.safetensors") for rank in range(2))
        assert_same_tensors(second, first)
    assert len({len(t) for key, t in load_file(tmp_path / "eva" / "end-0.safetensors").items() if "lora_A" in key}) > 1
