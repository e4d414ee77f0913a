"""A Hub on this machine for each test, adapters to push or to write cards for, and no waiting between attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, tiny_bert, tiny_llama, token_ids
from hub.cards import WORDS, save_tokenizer
from huggingface_hub import constants
from transformers import LlamaForCausalLM

from hf_lora import LoraConfig, apply_lora
from hf_lora.hub import network
from hf_lora.testing import LocalHub


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub-base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """An adapter of `user/base`, with things beside it that belong to no adapter."""

    folder = tmp_path_factory.mktemp("hub-adapter")
    with LocalHub() as hub, hub.active(tmp_path_factory.mktemp("hub-home")):
        hub.add_repo("user/base", base_folder)
        model = LlamaForCausalLM.from_pretrained("user/base")
        randomize(apply_lora(model)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# An adapter\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    for other in ("optimizer.pt", "training_args.bin", "notes.txt", "checkpoint-3/adapter_config.json", "runs/events"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not of the adapter")
    return folder


EXPECTED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "tokenizer_config.json"}
"""What is pushed of `adapter_folder`."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait, which does not happen; stalls are noticed soon."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(network, "READ_TIMEOUT", 0.25)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.25)
    from huggingface_hub import file_download

    if hasattr(file_download, "_ETAG_RETRY_TIMEOUT"):
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.25)
    return slept


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """The Hub of this process, with an empty cache in `tmp_path / "home"`."""
    with LocalHub() as running, running.active(tmp_path / "home"):
        yield running


@pytest.fixture
def with_base(hub: LocalHub, base_folder: Path) -> LocalHub:
    hub.add_repo("user/base", base_folder)
    return hub


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "bert-base"
    tiny_bert().bert.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def trained(bert_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `hf-lora train` made of 24 texts of two classes."""
    from hf_lora.train.parsing import parse_arguments
    from hf_lora.train.run import finetune

    folder = tmp_path_factory.mktemp("trained")
    lines = [f"{'open' if i % 2 else 'close'} the {WORDS[3 + i % 2]},{'yes' if i % 2 else 'no'}" for i in range(24)]
    for name in ("rows.csv", "held out.csv"):
        (folder / name).write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    flags = {
        "model": bert_base, "train-file": folder / "rows.csv", "test-file": folder / "held out.csv", "lora-r": 4,
        "output-dir": folder / "my-adapter", "num-train-epochs": 3, "per-device-train-batch-size": 4, "use-cpu": True,
        "learning-rate": 3e-3, "seed": 7, "lora-alpha-pattern": '{"query": 2.0}', "disable-tqdm": True,
    }  # fmt: skip
    return finetune(parse_arguments([f"--{name}={value}" for name, value in flags.items()]))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A classifier's adapter that was saved without a Trainer."""
    model = randomize(apply_lora(tiny_bert(), LoraConfig(r=4)))
    model.save_pretrained(tmp_path / "three")
    return tmp_path / "three"


ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "hf_lora.json"}


def put(hub: LocalHub, folder: Path, repo_id: str = "user/ad", **kwargs: Any) -> None:
    hub.add_repo(repo_id, {name: (folder / name).read_bytes() for name in EXPECTED}, **kwargs)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids()).logits
    return found


@pytest.fixture
def model(with_base: LocalHub) -> Any:
    return randomize(apply_lora(LlamaForCausalLM.from_pretrained("user/base")))
