"""What the trainer is put together from, each without a Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize
from tiny import adapter_values, texts, tiny_bert, tiny_llama
from transformers import TrainerState

from hf_lora import LoraConfig, TrainingError, apply_lora
from hf_lora.errors import AdapterFileError
from hf_lora.files.save import save_adapters
from hf_lora.testing import LocalHub
from hf_lora.train.checkpoint.fields import FIELDS, Field
from hf_lora.train.checkpoint.manifest import last_checkpoint, read_manifest, why_incomplete
from hf_lora.train.checkpoint.pushing import Pusher, make_repository
from hf_lora.train.checkpoint.store import CheckpointStore
from hf_lora.train.head_loss import HeadLoss
from hf_lora.train.watch.finite import FiniteWatch


def optimizer_of(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def write(store: CheckpointStore, folder: Path, model: Any, step: int) -> None:
    with store.writing(folder, model, writes=True, wait=lambda: None):
        save_adapters(model, folder)
        (folder / "trainer_state.json").write_text("{}")
        store.finish(folder, step, model, optimizer_of(model))


def test_a_store_writes_finds_and_loads_checkpoints(tmp_path: Path) -> None:
    store, model = CheckpointStore(), randomize(apply_lora(tiny_bert(), LoraConfig(r=2)))
    for step in (1, 2):
        write(store, tmp_path / f"checkpoint-{step}", model, step)
    newest = last_checkpoint(tmp_path)
    assert newest == str(tmp_path / "checkpoint-2")
    other = apply_lora(tiny_bert(), LoraConfig(r=2))
    store.load_adapters(newest, other)
    assert_same_tensors(adapter_values(other), adapter_values(model))
    manifest = read_manifest(newest)
    assert manifest is not None
    assert manifest["optimizer"] == "torch.AdamW"
    assert len(manifest["parameters"]) == len(adapter_values(model))
    with pytest.raises(KeyError), store.writing(tmp_path / "checkpoint-2", model, writes=True, wait=lambda: None):
        raise KeyError
    assert last_checkpoint(tmp_path) == newest


def test_one_more_field_of_a_checkpoint_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in the manifest, and a file that the manifest lists."""

    def save(folder: Path, run: Any) -> int:
        (folder / "size.txt").write_text("bytes")
        return sum(p.numel() for p in run.model.parameters())

    def same(folder: Path, saved: int, run: Any) -> None:
        assert (folder / "size.txt").read_text() == "bytes"
        if saved != sum(p.numel() for p in run.model.parameters()):
            raise AdapterFileError("another size")

    monkeypatch.setitem(FIELDS, "size", Field(save, same, of_optimizer=False))
    store, model = CheckpointStore(), apply_lora(tiny_bert(), LoraConfig(r=2))
    folder = tmp_path / "checkpoint-1"
    write(store, folder, model, 1)
    store.load_adapters(str(folder), model)
    model.add_adapter("more", LoraConfig(r=2))
    with pytest.raises(AdapterFileError, match="another size"):
        store.load_adapters(str(folder), model)
    (folder / "size.txt").unlink()
    assert why_incomplete(folder) == ["size.txt is missing"]


def test_a_pusher_pushes_what_lies_in_the_folders(tmp_path: Path, arguments: Any) -> None:
    args, model = arguments(save_strategy="steps", hub_strategy="checkpoint"), apply_lora(tiny_bert())
    folder = Path(args.output_dir) / "checkpoint-3"
    write(CheckpointStore(), folder, model, 3)
    (folder / "training_args.bin").write_bytes(b"the token")
    save_adapters(randomize(model), args.output_dir)
    state = TrainerState(global_step=3)
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        args.hub_token = hub.token
        name, pusher = make_repository(args), Pusher()
        job = pusher.push_checkpoint(args, name, state, folder, None)
        pusher.push_output(args, name, "Mine").result(timeout=60)
        assert job is not None
        assert job.done()  # one push after the other
        assert [commit.title for commit in hub.commits(name)][:2] == ["Mine", "Training in progress, step 3"]
        files = hub.files(name)
    assert "last-checkpoint/adapter_model.safetensors" in files
    assert not any("training_args" in file for file in files)


def test_the_loss_over_the_head_is_the_models_own() -> None:
    model = randomize(apply_lora(tiny_llama()))
    batch = {key: value[None] for key, value in texts(1).rows[0].items()}
    own = model(**batch)
    loss = HeadLoss().compute(model, batch, lambda: model(**batch)["loss"])
    assert loss is not None
    torch.testing.assert_close(loss, own.loss)
    found = HeadLoss().predict(model, batch, lambda: model(**batch)["loss"])
    assert found is not None
    predictions = found[1].predictions
    assert predictions is not None
    assert torch.equal(predictions[:, :-1], own.logits.argmax(-1)[:, :-1])
    off = HeadLoss(enabled=False)
    assert off.compute(model, batch, lambda: model(**batch)["loss"]) is None
    assert off.line() == ""
    assert HeadLoss().compute(tiny_bert(), batch, lambda: own.loss) is None


@pytest.mark.parametrize("large", [False, True])
def test_finite_values_are_let_through(large: bool) -> None:
    """Also those whose squares overflow."""
    model, watch = apply_lora(tiny_bert()), FiniteWatch()
    optimizer = optimizer_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30 if large else 1.0) if parameter.requires_grad else None
    watch.before_step(model, optimizer, torch.tensor(1.0), 1)
    name, spoilt = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    assert spoilt.grad is not None
    spoilt.grad.view(-1)[0] = float("nan")
    scaled = SimpleNamespace(scaler=object(), param_groups=optimizer.param_groups)
    watch.before_step(model, scaled, torch.tensor(1.0), 2)  # loss scaling leaves the step out by itself
    with pytest.raises(TrainingError, match=rf"Step 3: the loss and the gradients of 1 of \d+ tensors \({name}\)"):
        watch.before_step(model, optimizer, torch.tensor(float("inf")), 3)
