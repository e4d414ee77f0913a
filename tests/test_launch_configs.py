"""The launch configurations in examples/accelerate are read by Accelerate's own loader, and documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
KINDS = {
    "one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_bf16_base": "FSDP", "zero3": "DEEPSPEED",
    "cpu": "MULTI_CPU",
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
