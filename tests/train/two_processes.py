"""Run by test_distributed.py in each of two processes: train, resume, and compare."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import assert_same_tensors, randomize
from processes import leave
from tiny import SPARE, adapter_values, texts, texts_of_three, tiny_llama, tiny_tokens

from hf_lora import LoraTrainer, LoraTrainingArguments, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.train.checkpoint.manifest import MANIFEST_NAME, read_manifest, why_incomplete


def main(output_dir: str, ema: float) -> None:
    torch.set_num_threads(1)
    args = LoraTrainingArguments(
        output_dir=output_dir, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=8,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=5, learning_rate=1e-2,
        gradient_checkpointing=True, lora_dropout=0.2, ema=ema,
    )  # fmt: skip
    ends = []
    for resume in (None, f"{output_dir}/checkpoint-5"):
        trainer = LoraTrainer(tiny_tokens(), args, train_dataset=texts_of_three())
        trainer.train(resume_from_checkpoint=resume)
        assert SPARE not in adapter_layers(trainer.model)
        assert trainer.model_wrapped.gradient_as_bucket_view
        ends.append(adapter_values(trainer.model))
        dist.barrier()
    assert_same_tensors(ends[1], ends[0])

    mine = torch.cat([value.flatten() for value in ends[0].values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)

    folder = Path(output_dir, "checkpoint-5")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert why_incomplete(folder) == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    assert {p.name for p in folder.iterdir()} == {*manifest["files"], MANIFEST_NAME}


def language_model(output_dir: str) -> None:
    """The loss over the frozen head, shared and accumulated, moves the adapter as the model's own loss does."""
    ends = []
    for over_head in (True, False):
        args = LoraTrainingArguments(
            output_dir=output_dir, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=3, save_strategy="no",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, optim="sgd",
            frozen_head_loss=over_head,
        )  # fmt: skip
        model = randomize(apply_lora(tiny_llama()))
        trainer = LoraTrainer(model, args, train_dataset=texts())
        trainer.train()
        assert (trainer.head_loss.head is not None and trainer.head_loss.head.off is None) is over_head
        ends.append(adapter_values(model))
    start = adapter_values(randomize(apply_lora(tiny_llama())))
    for name, value in ends[0].items():
        moved = ends[1][name] - start[name]
        assert (value - ends[1][name]).norm() <= 1e-4 * moved.norm(), name


if __name__ == "__main__":
    for decay in (0.0, 0.9):
        main(f"{sys.argv[1]}/{decay}", decay)
    language_model(sys.argv[1])
    leave()
