"""Clipping, AdamW and zero_grad for the many small tensors of LoRA, relative to one pass of fused AdamW.

    python examples/benchmarks/optimizer.py --preset cpu

448 tensors are the adapters of Llama-3-8B: A and B of seven linear layers in each of 32 layers; --preset cpu has them
a quarter as wide. The optimizers are those of Trainer (--optim), wrapped and clipped by Accelerate as Trainer does it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import Table, arguments, device_of, settings_of, take_turns
from torch import Tensor, nn

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch_fused": {"fused": True},
    "adamw_torch": {},  # PyTorch chooses: foreach on a GPU, a loop over the tensors on a CPU
    "adamw_torch, foreach": {"foreach": True},
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, help="H; MLP 3.5 H, keys and values H / 4; default: 1024, h200: 4096")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    return parser.parse_args(words)


def shapes(hidden: int, layers: int, rank: int) -> list[tuple[int, int]]:
    """A (R, I) and B (O, R) of q, k, v, o, gate, up and down."""
    mlp, kv = 7 * hidden // 2, hidden // 4
    sizes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    return [shape for i, o in sizes for shape in ((rank, i), (o, rank))] * layers


class Parameters(nn.Module):
    """Parameters of given shapes with gradients, kept so that every step has the same."""

    def __init__(self, sizes: list[tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.randn(size, device=device) * 0.01) for size in sizes)
        self.grads = [torch.randn_like(p) * 0.01 for p in self.all]

    def give_gradients(self) -> None:
        for parameter, grad in zip(self.all, self.grads, strict=True):
            parameter.grad = grad


def trainer_step(model: Parameters, accelerator: Any, flags: dict[str, Any]) -> Callable[[], Tensor]:
    """The work of Trainer between the last backward of a step and the first forward of the next."""
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-4, **flags))

    def step() -> Tensor:
        model.give_gradients()
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return norm

    return step


def one_pass(model: Parameters) -> Callable[[], None]:
    """Only fused AdamW: reads gradient, weight and two moments, and writes three of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.give_gradients()
        optimizer.step()

    return step


def measure(options: argparse.Namespace) -> Table:
    from accelerate import Accelerator

    device = device_of(options)
    accelerator = Accelerator(cpu=device.type == "cpu")
    hidden = options.hidden or (4096 if options.preset == "h200" else 1024)
    small = shapes(hidden, options.layers, options.rank)
    total = sum(a * b for a, b in small)
    calls: dict[str, Callable[[], object]] = {"one pass": one_pass(Parameters([(total,)], device))}
    for name, flags in OPTIMIZERS.items():
        calls[f"{len(small)} tensors, {name}"] = trainer_step(Parameters(list(small), device), accelerator, flags)
    calls["one flat tensor, clipped, fused"] = trainer_step(
        Parameters([(total,)], device), accelerator, OPTIMIZERS["adamw_torch_fused"]
    )
    times = take_turns(calls, options.rounds)
    rows = [
        {"variant": name, "name": name, "ratio": taken.over(times["one pass"]), "ms": taken.median * 1e3}
        for name, taken in times.items()
    ]
    return Table(
        "optimizer",
        f"Clip, AdamW and zero_grad over {len(small)} tensors of {total:,} float32 numbers in all",
        {"variant": "variant", "ratio": "over one pass of fused AdamW", "ms": "median ms"},
        rows,
        settings_of(options),
        ["One pass is AdamW alone over one tensor; a variant that clips has to read the gradients once more."],
    )


if __name__ == "__main__":
    asked = parse()
    measure(asked).show(asked.json)
