"""Run by test_quantized_sharding.py in each of two processes: an NF4 base in bfloat16 storage under `fully_shard`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import randomize, relative_error, token_ids
from processes import leave
from quantized_bases import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_lora import LoraConfig, apply_lora
from hf_lora.layers.storages import unshardable


def make(base: Path) -> Any:
    model = load(base, "nf4-double", torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
    return randomize(apply_lora(model, LoraConfig(r=4)), scale=0.1).train()


def main(base: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    alone, sharded = make(base), make(base)
    assert unshardable(sharded) == []
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    packed: Any = sharded.model.layers[0].mlp.up_proj.weight
    assert isinstance(packed, DTensor)
    assert packed.to_local().numel() == packed.numel() // 2
    assert {p.dtype for p in sharded.parameters()} == {torch.bfloat16, torch.float32}

    ids = token_ids(4, 8)
    mine = ids.chunk(2)[dist.get_rank()]
    for model, rows in ((sharded, mine), (alone, ids)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    start = {n: p.detach().clone() for n, p in make(base).named_parameters() if p.requires_grad}
    one = {n: p for n, p in alone.named_parameters() if p.requires_grad}
    both: Any = {n: p for n, p in sharded.named_parameters() if p.requires_grad}
    assert one.keys() == both.keys()
    for name, value in one.items():
        moved = value.detach() - start[name]
        assert float(moved.norm()) > 0, name
        # bfloat16 activations, summed over other batches
        assert relative_error(both[name].full_tensor() - start[name], moved) < 0.1, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
