"""The example and the benchmark over 4-bit bases, as a user starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quantized_bases import available, save_base

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, folder: Path, *words: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_memory_of_a_step(tmp_path: Path) -> None:
    available("nf4")
    base = save_base(tmp_path / "base")
    run("benchmarks/quantized_memory.py", tmp_path, "--base", str(base), "--rows", "1", "--tokens", "8",
        "--threads", "1", "--json", "table.json")  # fmt: skip
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(rows) == 6
    # 64 x 64 of the embedding and of the head, and five norms of 64: two bytes more for each
    assert [row["bytes"]["upcast"] for row in rows] == 2 * [2 * (2 * 64 * 64 + 5 * 64), 0, 0]
    assert all("bfloat16" in row["bytes"]["frozen"] for row in rows if row["method"] == "hf_lora")


@pytest.mark.slow
def test_qlora(tmp_path: Path) -> None:
    available("nf4")
    output = run("qlora.py", tmp_path, "--steps", "4")
    losses = [float(v) for v in re.findall(r"loss (\d+\.\d+)\n", output)]
    assert len(losses) == 3
    beside, merged, dense = losses
    # After four steps an update is smaller than half a place of bfloat16 in many weights, so the rounded sum loses a
    # part of it, whoever adds: 8% in the loss were seen, with PEFT as with us.
    assert abs(dense - beside) < 0.15 * beside
    assert merged < 1.2 * beside
    config = json.loads((tmp_path / "out" / "qlora" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
