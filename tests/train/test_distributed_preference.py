"""Two processes train the adapter of one process with the same global batches: DPO, and embeddings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_chat import PLAIN, byte_tokenizer
from test_sft import llama
from tiny import bert_of_texts

pytest.importorskip("trl", reason="the extra chat is not installed")
pytest.importorskip("sentence_transformers")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    model = llama()
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "llama")
    byte_tokenizer(PLAIN["chatml"]).save_pretrained(tmp_path / "llama")
    bert_of_texts(tmp_path / "bert")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    for name, launch in (("one", []), ("two", two)):
        command = [sys.executable, *launch, str(here / "preference_worker.py"), str(tmp_path), str(tmp_path / name)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("preference", "embedding"):
        start = load_file(tmp_path / "one" / kind / "start.safetensors")
        one, two_ = (load_file(tmp_path / name / kind / "end.safetensors") for name in ("one", "two"))
        assert one.keys() == two_.keys() == start.keys()
        for name, value in one.items():
            moved = (value - start[name]).norm()
            assert (two_[name] - value).norm() <= 1e-4 * moved + 1e-9, (kind, name)
        assert sum(bool((value != start[name]).any()) for name, value in one.items()) > len(one) / 2
