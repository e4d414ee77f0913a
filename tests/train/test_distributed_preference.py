"""Two processes train the adapter of one process with the same global batches: DPO, and embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import PLAIN, byte_tokenizer
from processes import run_processes
from safetensors.torch import load_file
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
    for name, processes in (("one", 0), ("two", 2)):
        worker = Path(__file__).with_name("preference_worker.py")
        run_processes(worker, tmp_path, tmp_path / name, processes=processes)
    for kind in ("preference", "embedding"):
        start = load_file(tmp_path / "one" / kind / "start.safetensors")
        one, two_ = (load_file(tmp_path / name / kind / "end.safetensors") for name in ("one", "two"))
        assert one.keys() == two_.keys() == start.keys()
        for name, value in one.items():
            moved = (value - start[name]).norm()
            assert (two_[name] - value).norm() <= 1e-4 * moved + 1e-9, (kind, name)
        assert sum(bool((value != start[name]).any()) for name, value in one.items()) > len(one) / 2
