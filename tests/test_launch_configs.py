"""The launch configurations in examples/accelerate are read by Accelerate's own loader, and documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
KINDS = {
    "one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_bf16_base": "FSDP", "zero3": "DEEPSPEED",
    "cpu": "MULTI_GPU",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    assert kind == KINDS[file.stem]
    words = ["--config_file", str(file), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == config.num_processes
    assert args.use_fsdp is (kind == "FSDP")
    assert args.use_deepspeed is (kind == "DEEPSPEED")
    if kind == "FSDP":
        assert str(args.fsdp_version) == "2"
        assert str(args.fsdp_cpu_ram_efficient_loading).lower() == str("bf16" in file.stem).lower()
    if kind == "DEEPSPEED":
        assert int(args.zero_stage) == 3


def test_each_is_documented() -> None:
    assert {f.stem for f in FILES} == KINDS.keys()
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert all(f"accelerate launch --config_file examples/accelerate/{f.name} " in page for f in FILES)


SCRIPT = """
import sys
from pathlib import Path
from tiny import sentences, tiny_bert
from hf_lora import LoraTrainer, LoraTrainingArguments

args = LoraTrainingArguments(sys.argv[1], max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), accept_ddp_fallback="--ddp" in sys.argv)
trainer.train()
Path(sys.argv[1], f"{trainer.args.process_index} of {trainer.accelerator.num_processes}").touch()
"""


def launched(tmp_path: Path, *words: str, script_words: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
    """(exit status, the processes that trained, standard error) of `accelerate launch`."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, str(script), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *script_words], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, sorted(path.name for path in (tmp_path / "out").glob("* of *")), done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=() if f.stem == "cpu" else pytest.mark.slow) for f in FILES]
)
def test_each_starts_its_processes(file: Path, tmp_path: Path) -> None:
    """Here with two processes on CPUs, where Accelerate has no FSDP: that is refused."""
    count = 1 if file.stem == "one_gpu" else 2
    words = ["--config_file", str(file), "--num_processes", str(count), "--mixed_precision", "no"]
    words += ["--main_process_port", "0"] if count > 1 else []
    code, trained, errors = launched(tmp_path, *words)
    if KINDS[file.stem] == "FSDP":
        assert code != 0
        assert "FSDP was requested by the launch configuration" in errors
        code, trained, errors = launched(tmp_path, *words, script_words=("--ddp",))
    assert code == 0, errors[-3000:]
    assert trained == [f"{i} of {count}" for i in range(count)]


@pytest.mark.distributed
def test_a_launch_that_starts_fewer_processes_is_reported(tmp_path: Path) -> None:
    code, trained, errors = launched(tmp_path, "--cpu", "--num_processes", "2")
    assert code == 0, errors[-3000:]
    assert trained == ["0 of 1"]  # Accelerate's choice, without MPI
    assert "torchrun --nproc_per_node" in errors
