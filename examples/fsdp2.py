"""FSDP2 without a Trainer: each process holds its part of the base and of the adapter, on GPUs or CPUs.

    torchrun --nproc_per_node 2 examples/fsdp2.py

Scripts with LoraTrainer need no such code: on GPUs, launch them with examples/accelerate/fsdp2.yaml.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from finetune_smollm2 import read
from smollm2 import base_folder
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_lora import LoraConfig, apply_lora, gathered_state


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model with a chat template; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="out/fsdp2")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(words)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    source = options.model or str(base_folder())
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)  # every process begins with the same adapter
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = apply_lora(model, LoraConfig(r=16)).to(device).train()  # adapters first, then sharding
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:  # the blocks, as transformers names them
            fully_shard(module)
    fully_shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    collate = DataCollatorForSeq2Seq(tokenizer)
    chats = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in read("train")]
    for step in range(options.steps):
        first = 4 * (step * processes + rank)  # each process reads other rows
        rows = [chats[i % len(chats)] for i in range(first, first + 4)]
        batch = collate([{"input_ids": row, "labels": row} for row in rows]).to(device)
        loss = model(**batch).loss
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}: loss {loss / processes:.4f}", flush=True)

    state = gathered_state(model)  # on every process: each holds a part
    model.save_pretrained(options.output, state_dict=state, is_main_process=rank == 0)
    if rank == 0:
        tokenizer.save_pretrained(options.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
