"""Two processes under DDP, FSDP2 and ZeRO against one process: the same numbers, and checkpoints of one form.

Each engine's worker starts once and leaves its results in a folder; the tests read them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import STEPS, fresh_model, run_arguments, write_result
from helpers import assert_same_tensors
from processes import run_processes
from quantized_bases import load, save_base
from safetensors.torch import load_file
from tiny import texts, tiny_bert, tiny_llama

from hf_lora import ConfigError, LoraModel, LoraTrainer, StateError, gathered_state
from hf_lora.train.engines import check_engine

pytestmark = pytest.mark.distributed
Tensors = dict[str, torch.Tensor]
FSDP = ("fsdp", "fsdp-resumed", "fsdp-from-one")
ZERO = ("zero3", "zero3-resumed", "zero3-from-one", "zero3-loaded", "zero2", "zero2-from-one")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all results, with those of one process in it."""
    out = tmp_path_factory.mktemp("engines")
    train_alone(out / "single")
    tiny_llama().save_pretrained(out / "base")
    return out


@pytest.fixture(scope="module")
def ddp(single: Path) -> Path:
    run_processes(Path(__file__).with_name("engines_worker.py"), single)
    return single


@pytest.fixture(scope="module")
def zero(single: Path) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'hf_lora[deepspeed]')")
    run_processes(Path(__file__).with_name("zero_worker.py"), single)
    return single


@pytest.fixture
def results(request: pytest.FixtureRequest, run: str) -> Path:
    found: Path = request.getfixturevalue("zero" if run.startswith("zero") else "ddp")
    return found


def train_alone(folder: Path, resume: Path | None = None) -> Any:
    torch.set_num_threads(1)
    trainer = LoraTrainer(fresh_model(), run_arguments(folder), train_dataset=texts())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    write_result(folder, gathered_state(trainer.model))
    return trainer


def end(folder: Path, rank: int = 0) -> Tensors:
    return load_file(folder / f"end-{rank}.safetensors")


def assert_moved_alike(found: Tensors, expected: Tensors) -> None:
    """Equal but for rounding: a step's sums have another order, by one rounding each; twenty steps add them up."""
    start_values = {n: p.detach() for n, p in fresh_model().named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() == start_values.keys()
    for name, value in expected.items():
        moved = (value - start_values[name]).norm()
        assert moved > 0.1 * value.numel() ** 0.5 * 1e-2, name
        assert (found[name] - value).norm() <= STEPS * torch.finfo(torch.float32).eps * value.norm(), name


@pytest.mark.parametrize("run", ["ddp", "ddp-from-one", *FSDP, *ZERO])
def test_two_processes_train_as_one(results: Path, run: str) -> None:
    assert_moved_alike(end(results / run), end(results / "single"))
    assert_same_tensors(end(results / run, 1), end(results / run))


@pytest.mark.parametrize("run", ["fsdp", "zero3"])
def test_resuming_changes_no_bit(results: Path, run: str) -> None:
    assert_same_tensors(end(results / f"{run}-resumed"), end(results / run))


@pytest.mark.parametrize("run", ["ddp", "fsdp", "zero3", "zero2"])
def test_a_checkpoint_of_two_goes_on_alone(results: Path, run: str, tmp_path: Path) -> None:
    train_alone(tmp_path, resume=results / run / "checkpoint-10")
    assert_moved_alike(end(tmp_path), end(results / "single"))


@pytest.mark.parametrize("run", ["ddp", "fsdp", "zero3", "zero2"])
def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(results: Path, run: str) -> None:
    theirs, ours = results / "single" / "checkpoint-10", results / run / "checkpoint-10"
    names = {p.name for p in theirs.iterdir()} - {"rng_state.pth"}
    assert {p.name for p in ours.iterdir()} == names | {"rng_state_0.pth", "rng_state_1.pth"}
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        assert (ours / name).stat().st_size <= (theirs / name).stat().st_size + 1024, name
    for name in ("adapter_config.json", "hf_lora.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    saved, alone = (load_file(f / "adapter_model.safetensors") for f in (ours, theirs))
    assert saved.keys() == alone.keys()
    for key, value in alone.items():
        assert (saved[key] - value).norm() <= STEPS * torch.finfo(torch.float32).eps * value.norm(), key
    total = sum(p.stat().st_size for p in ours.iterdir())
    assert total < sum((ours / n).stat().st_size for n in ("adapter_model.safetensors", "optimizer.pt")) + 2**20


@pytest.mark.parametrize("run", ["fsdp", "zero3"])
def test_the_final_save_loads_alone(results: Path, run: str) -> None:
    model = LoraModel.from_pretrained(results / f"{run}-final", base_model=tiny_llama())
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert_same_tensors(found, end(results / run))


@pytest.mark.parametrize("run", ["fsdp", "zero"])
def test_what_a_sharded_model_cannot_do_is_said(results: Path, run: str) -> None:
    said = {name: (results / f"{run}-{name}.txt").read_text() for name in ("parts", "merge", "add")}
    assert "gathered_state(model)" in said["parts"]
    assert "q_proj: its weight is" in said["merge"]
    assert "already sharded" in said["add"]
    assert "Call apply_lora before" in said["add"]


def test_the_best_model_is_read_into_the_shards(ddp: Path) -> None:
    best = Path((ddp / "best-0.txt").read_text())
    saved = load_file(best / "adapter_model.safetensors")
    found = end(ddp / "fsdp-best")
    for name, value in found.items():
        key = f"base_model.model.{name.replace('.default', '')}"
        assert torch.equal(saved[key], value), name


def test_a_checkpoint_is_read_into_zeros_parts(zero: Path) -> None:
    saved = load_file(zero / "zero3" / "checkpoint-10" / "adapter_model.safetensors")
    for name, value in end(zero / "zero3-back").items():
        assert torch.equal(saved[f"base_model.model.{name.replace('.default', '')}"], value), name


def test_a_bfloat16_base_and_float32_adapters_share_an_fsdp_group(ddp: Path) -> None:
    found, start_values = end(ddp / "fsdp-bf16"), fresh_model(bf16=True).state_dict()
    assert_same_tensors(end(ddp / "fsdp-bf16", 1), found)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in found.values())
    assert all((v - start_values[n]).norm() > 0 for n, v in found.items())


def test_zero_in_bfloat16_saves_the_float32_masters(zero: Path) -> None:
    found = end(zero / "zero3-bf16")
    assert any(not torch.equal(v, v.bfloat16().float()) for v in found.values())


def test_a_base_that_zero_cut_up_is_counted_whole(zero: Path) -> None:
    model = fresh_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert (zero / "zero-counts.txt").read_text() == f"{(trained, total)} {(trained, total)}"


def test_a_loop_without_a_trainer_goes_on_where_it_was(ddp: Path) -> None:
    folder = ddp / "loop" / "step-4"
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.bin"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob("model*")), "the base"
    ends = [load_file(ddp / name / "adapter" / "adapter_model.safetensors") for name in ("loop-resumed", "loop")]
    assert_same_tensors(*ends)
    before = load_file(folder / "adapter_model.safetensors")
    assert all((ends[0][key] - value).norm() > 0 for key, value in before.items())


def test_processes_with_other_adapters_all_say_so(ddp: Path) -> None:
    said = [(ddp / f"unlike-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "process 1: adapter 'default' is r=5" in said[0]
    assert re.search(r"q_proj\.lora_A\.default\.weight is \[5, 32\], on process 0 \[4, 32\]|more tensors", said[0])


def test_fsdp_starts_from_the_first_process(ddp: Path) -> None:
    expected = {n: p.detach() for n, p in fresh_model(seed=3).named_parameters() if p.requires_grad}
    assert_same_tensors(end(ddp / "drawn"), expected)


# In one process: which engine.


class _Accelerator:
    is_main_process = True

    def __init__(self, kind: str, **state: Any) -> None:
        self.distributed_type = kind
        self.state = type("State", (), state)()


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_an_engine_that_is_not_there_is_an_error(arguments: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, args = _Accelerator("NO"), arguments()
    check_engine(args, alone, None, False, "LoraTrainer")
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ConfigError, match=rf"{name.upper()} was requested by the launch[\s\S]*accept_ddp_fallback"):
        check_engine(args, alone, None, False, "LoraTrainer")
    check_engine(args, alone, None, True, "LoraTrainer")
    monkeypatch.delenv(f"ACCELERATE_USE_{name.upper()}")
    monkeypatch.setattr(args, name, {"stage": 3}, raising=False)
    with pytest.raises(ConfigError, match=f"by the training argument {name}, but Accelerate runs NO"):
        check_engine(args, alone, None, False, "LoraTrainer")


def test_nothing_is_changed_before_the_engine_is_refused(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = tiny_bert(), arguments()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP was requested"):
        LoraTrainer(model, args)
    assert not isinstance(model, LoraModel)
    assert isinstance(LoraTrainer(model, args, accept_ddp_fallback=True).model, LoraModel)
    LoraTrainer(tiny_bert(), arguments(accept_ddp_fallback=True))


def test_engines_that_adapters_cannot_follow_are_refused(arguments: Any) -> None:
    model = tiny_bert()
    plugin = type("Plugin", (), {"fsdp_version": 1, "zero_stage": 0})()
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_engine(arguments(), _Accelerator("FSDP", fsdp_plugin=plugin), model, False, "LoraTrainer")
    with pytest.raises(ConfigError, match="ZeRO stage 0"):
        check_engine(arguments(), _Accelerator("DEEPSPEED", deepspeed_plugin=plugin), model, False, "LoraTrainer")
    plugin.fsdp_version, plugin.zero_stage = 2, 1
    check_engine(arguments(), _Accelerator("FSDP", fsdp_plugin=plugin), model, False, "LoraTrainer")
    check_engine(arguments(), _Accelerator("DEEPSPEED", deepspeed_plugin=plugin), model, False, "LoraTrainer")


def test_fsdp_says_which_quantized_weights_stay_whole(tmp_path: Path, arguments: Any, messages: list[str]) -> None:
    base, fsdp = save_base(tmp_path / "base"), _Accelerator("FSDP")
    check_engine(arguments(), fsdp, load(base, "nf4", bnb_4bit_quant_storage=torch.float32), False, "LoraTrainer")
    assert not messages
    check_engine(arguments(), fsdp, load(base, "nf4"), False, "LoraTrainer")
    assert "does not shard 14 quantized weights" in messages[-1]
    assert "bnb_4bit_quant_storage" in messages[-1]
    with pytest.raises(ConfigError, match="cannot shard 14 quantized weights"):
        check_engine(arguments(), fsdp, load(base, "int8"), False, "LoraTrainer")


def test_a_model_of_split_tensors_is_refused(tmp_path: Path, arguments: Any) -> None:
    """As tensor parallelism leaves it: DTensors that no FSDP manages."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from hf_lora import apply_lora

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny_bert()
        layer = model.bert.encoder.layer[0].output.dense
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(StateError, match=r"DTensor[\s\S]*without tp_plan"):
            apply_lora(model)
        with pytest.raises(StateError, match=r"DTensor[\s\S]*Tensor parallelism is not supported"):
            check_engine(arguments(), _Accelerator("NO"), model, False, "LoraTrainer")
        assert not isinstance(model, LoraModel)
    finally:
        dist.destroy_process_group()
