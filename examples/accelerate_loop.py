"""A training loop with Accelerate instead of Trainer: adapter-only checkpoints, and resuming from one.

    accelerate launch --config_file examples/accelerate/cpu.yaml examples/accelerate_loop.py
    accelerate launch --config_file examples/accelerate/cpu.yaml examples/accelerate_loop.py --resume runs/loop/step-20

The model is a tiny one with random weights and the data are made up, so that it runs anywhere in seconds; put
`from_pretrained` and a data set of yours in their places.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lora import LoraConfig, apply_lora, register_adapter_hooks


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return apply_lora(LlamaForCausalLM(config), LoraConfig(r=4))


def make_data(rows: int = 64, length: int = 16) -> list[torch.Tensor]:
    """Sequences that count up by one from a random start."""
    starts = torch.randint(0, 128, (rows,), generator=torch.Generator().manual_seed(0))
    return [(start + torch.arange(length)) % 128 for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/loop"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run saved, such as runs/loop/step-20")
    args = parser.parse_args()

    accelerator = Accelerator()
    register_adapter_hooks(accelerator)
    set_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(make_data(), batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    done = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        done = int(args.resume.name.rpartition("-")[2])
    model.train()
    step = 0
    loss = torch.zeros(())
    while step < args.steps:
        for batch in loader:
            step += 1
            if step <= done:  # skip the batches of the earlier run
                continue
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % args.save_every == 0:
                accelerator.save_state(str(args.output / f"step-{step}"))
            if step == args.steps:
                break
    accelerator.wait_for_everyone()
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(args.output / "adapter", is_main_process=accelerator.is_main_process)
    accelerator.print(f"loss after {step} steps: {loss.item():.4f}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
