"""Every launch configuration and every launch line of the documentation and the examples, run with two processes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from processes import run_once_more_if_aborted

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


LAUNCHED = re.compile(r"\b(?:accelerate launch|torchrun) [^`\n]*\.py\b[^`\n]*")
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.[py][ya]*")]
LINES = sorted({line.strip() for text in TEXTS for line in LAUNCHED.findall(text.read_text(encoding="utf-8"))})
LOOP, FSDP2 = "examples/accelerate_loop.py", "torchrun --nproc_per_node 2 examples/fsdp2.py"


def test_each_is_documented_and_each_line_is_run() -> None:
    """Those of `train.py` by one test for each, those of the examples by a test of each example."""
    assert {f.stem for f in FILES} == KINDS.keys()
    assert {line for line in LINES if line.endswith(" train.py")} == {
        "torchrun --nproc_per_node 4 train.py",
        *(f"accelerate launch --config_file examples/accelerate/{f.name} train.py" for f in FILES),
    }
    assert len(LINES) == len(FILES) + 4
    assert FSDP2 in LINES
    assert [LOOP in line for line in LINES].count(True) == 2


SCRIPT = """
import sys
from pathlib import Path
from tiny import sentences, tiny_bert
from hf_lora import LoraTrainer, LoraTrainingArguments

args = LoraTrainingArguments(sys.argv[1], max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), accept_ddp_fallback="--ddp" in sys.argv)
trainer.train()
Path(sys.argv[1], f"{trainer.args.process_index} of {trainer.accelerator.num_processes}").touch()
trainer.accelerator.end_training()  # else PyTorch's threads may abort a process that ends after another
"""


MODULES = {"accelerate launch": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}


def run_line(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a launch line with this interpreter; files are those of this project, and the script writes to a folder."""
    command, module = next((name, module) for name, module in MODULES.items() if line.startswith(name))
    words = [str(ROOT / w) if w.startswith("examples/") else w for w in shlex.split(line.removeprefix(command))]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return run_once_more_if_aborted([sys.executable, "-m", module, *words], cwd=folder, env=environment)


def launched(tmp_path: Path, line: str) -> tuple[int, list[str], str]:
    """(exit status, the processes that trained, standard error) of a line that launches `train.py`."""
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run_line(line.replace(" train.py", " train.py out"), tmp_path)
    return done.returncode, sorted(path.name for path in (tmp_path / "out").glob("* of *")), done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=line.removesuffix(" train.py"), marks=() if "cpu.yaml" in line else pytest.mark.slow)
        for line in LINES
        if line.endswith(" train.py")
    ],
)
def test_each_line_starts_its_processes(line: str, tmp_path: Path) -> None:
    """Here with two processes on CPUs, where Accelerate has no FSDP: that is refused."""
    count = 1 if "one_gpu" in line else 2
    if line.startswith("torchrun"):
        line = line.replace("--nproc_per_node 4", "--standalone --nproc_per_node 2")
    else:
        words = f"--num_processes {count} --mixed_precision no" + (" --main_process_port 0" if count > 1 else "")
        line = line.replace(" train.py", f" {words} train.py")
    code, trained, errors = launched(tmp_path, line)
    if "fsdp2" in line:
        assert code != 0
        assert "FSDP was requested by the launch configuration" in errors
        code, trained, errors = launched(tmp_path, f"{line} --ddp")
    assert code == 0, errors[-3000:]
    assert trained == [f"{i} of {count}" for i in range(count)]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_lines_of_the_loop_save_and_resume(tmp_path: Path) -> None:
    first, resumed = sorted((line for line in LINES if LOOP in line), key=len)
    ends = []
    for line in (first, resumed):
        done = run_line(line.replace(f" {LOOP}", f" --main_process_port 0 {LOOP}"), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        ends.append(done.stdout.splitlines()[-1])
    assert ends[0].startswith("loss after 40 steps")
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_line_of_fsdp2_saves_the_whole_adapter(tmp_path: Path) -> None:
    from chat_templates import PLAIN, byte_tokenizer
    from helpers import tiny_llama
    from safetensors.torch import load_file

    tokenizer = byte_tokenizer(PLAIN["chatml"])
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    done = run_line(
        f"{FSDP2} --model base --output out --steps 5".replace("torchrun", "torchrun --standalone"), tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 5: loss" in done.stdout
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (16, 32)
    assert all(value.any() and value.isfinite().all() for value in saved.values())


@pytest.mark.distributed
def test_a_launch_that_starts_fewer_processes_is_reported(tmp_path: Path) -> None:
    code, trained, errors = launched(tmp_path, "accelerate launch --cpu --num_processes 2 train.py")
    assert code == 0, errors[-3000:]
    assert trained == ["0 of 1"]  # Accelerate's choice, without MPI
    assert "torchrun --nproc_per_node" in errors
