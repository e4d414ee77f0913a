"""One training step (forward and backward) with adapters, relative to the same step of the frozen base.

    python examples/benchmarks/train_step.py --preset cpu --model llama --dtype bfloat16 --dropout 0.05

The frozen base is the limit: no adapter can be trained without its forward and its backward. All variants alternate
in one process, on the same batch, with the same random adapters on every linear layer except the head, and in training
mode: the base's own dropout, if any, is on in all of them. Before timing, the adapters' gradients are compared with
those of a plain model in float64.

--loss head removes the labels of half of the tokens and runs the steps with Trainer.training_step; hf_lora uses
LoraTrainer's loss over the frozen head, and the frozen base its ordinary loss.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import variants
from common import DTYPES, Table, arguments, device_of, gpu_peak, keep_memory, settings_of, take_turns
from variants import (
    ON_REQUEST,
    VARIANTS,
    Batch,
    Case,
    Lora,
    build,
    flop_limit,
    gradient_errors,
    reference_gradients,
    runnable,
    stepper,
)

LIMITS = {"float32": 1e-4, "bfloat16": 0.1}
"""Relative errors above which gradients are wrong, beyond rounding."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument(
        "--model",
        choices=("llama", "minilm", "smollm2"),
        default="llama",
        help="llama: random weights (h200: the shapes of Llama-3-8B); the others: real ones",
    )
    parser.add_argument("--base", help="folder of SmolLM2,; default: created from its package")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the base; default: float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--autocast", action="store_true", help="run under bfloat16 autocast, as --bf16 of Trainer does"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loss", choices=("model", "head"), default="model")
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), help="default: all but those with torch.compile and DoRA"
    )
    parser.add_argument(
        "--compile", action="store_true", help="PEFT under torch.compile too (always with --preset h200)"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="let the C library keep freed memory, for all variants"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds for every variant")
    parser.add_argument("--repeats", type=int, default=1, help="steps of a variant per round")
    return parser.parse_args(words)


def case_of(options: argparse.Namespace, device: torch.device) -> Case:
    """The model and the batch for the options."""
    dtype = DTYPES[options.dtype]
    large = options.preset == "h200"
    if options.model == "smollm2":
        return variants.smollm2(dtype, device, base=options.base, **(dict(rows=16, tokens=1024) if large else {}))
    if options.model == "minilm":
        return variants.minilm(dtype, device, **(dict(rows=64, tokens=64) if large else {}))
    return variants.llama_8b(dtype, device) if large else variants.llama(dtype, device)


def prove(built: dict[str, Any], case: Case, lora: Lora, autocast: bool, dtype: str) -> dict[str, float]:
    """The relative error of each variant's gradients, without dropout. Exits if one is wrong."""
    few = {k: v[:2, :32] if v.dim() > 1 else v[:2] for k, v in case.batch.items()}
    references = {dora: reference_gradients(case, lora, few, dora) for dora in {"dora" in name for name in built}}
    limit = LIMITS["bfloat16" if autocast else dtype]
    errors: dict[str, float] = {}
    for name, model in built.items():
        if name in ("frozen", "full"):
            continue
        errors[name], worst = gradient_errors(model, few, references["dora" in name], autocast)
        if not errors[name] < limit or not worst < 10 * limit:
            sys.exit(
                f"The gradients of {VARIANTS[name]} are wrong: relative error {errors[name]:.1e} in all and "
                f"{worst:.1e} in the worst tensor, where roundings explain {limit:.0e}. Nothing was timed."
            )
    return errors


def trainer_stepper(variant: str, model: Any, batch: Batch, autocast: bool) -> Callable[[], object]:
    """A step of Trainer; for hf_lora with the loss over the frozen head."""
    from transformers import Trainer, TrainingArguments

    from hf_lora import LoraTrainer

    cls = LoraTrainer if variant.startswith("ours") else Trainer
    args = TrainingArguments(
        "out/benchmarks/trainer", report_to="none", bf16=autocast, use_cpu=batch["input_ids"].device.type == "cpu"
    )
    trainer = cls(model, args)
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it in its loop

    def step() -> object:
        loss = trainer.training_step(model, batch)
        model.zero_grad()
        return loss

    return step


def steppers(built: dict[str, Any], case: Case, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A function for each variant that runs one step."""
    if options.loss == "model":
        return {name: stepper(name, model, case.batch, options.autocast) for name, model in built.items()}
    batch = copy.copy(case.batch)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, : batch["labels"].shape[1] // 2] = -100  # the prompt
    return {
        name: stepper(name, model, batch, options.autocast)
        if name in ("frozen", "full")
        else trainer_stepper(name, model, batch, options.autocast)
        for name, model in built.items()
    }


def measure(options: argparse.Namespace, case: Case | None = None) -> Table:
    device = device_of(options)
    options.dtype = options.dtype or ("float32" if options.preset == "cpu" or options.autocast else "bfloat16")
    kept = keep_memory() if options.keep_memory else False
    case = case or case_of(options, device)
    chosen = options.variants or [v for v in VARIANTS if v not in ON_REQUEST]
    if not options.variants and (options.compile or options.preset == "h200"):
        chosen.append("peft_compiled")
    lora = Lora(options.rank, 2 * options.rank, options.dropout)
    plain = case.load()
    limit = flop_limit(plain, case.targets(plain), options.rank)
    del plain
    chosen = runnable(name for name in VARIANTS if name in chosen)
    built = {name: build(name, case, lora) for name in chosen}
    errors = prove(built, case, lora, options.autocast, options.dtype)
    calls = steppers(built, case, options)
    times = take_turns(calls, options.rounds, options.repeats)
    peaks = {name: gpu_peak(call) for name, call in calls.items()} if device.type == "cuda" else {}
    rows = [
        {
            "variant": VARIANTS[name],
            "name": name,
            "ms": taken.median * 1e3,
            "frozen": taken.over(times["frozen"]) if "frozen" in times else None,
            "peft": taken.over(times["peft"]) if "peft" in times else None,
            "error": f"{errors[name]:.1e}" if name in errors else None,
            "peak": peaks.get(name),
        }
        for name, taken in times.items()
    ]
    batch, tokens = case.batch["input_ids"].shape
    dtype = f"bfloat16 autocast over {options.dtype}" if options.autocast else options.dtype
    through = ", through the Trainer, half of the tokens labeled" if options.loss == "head" else ""
    return Table(
        "train_step",
        f"A training step of {options.model}, {dtype}, {batch}x{tokens} tokens, rank {options.rank}, "
        f"dropout {options.dropout:g}{through}",
        {"variant": "variant", "ms": "median ms", "frozen": "over frozen base", "peft": "over PEFT's default",
         "error": "gradient error"} | ({"peak": "GiB of a step"} if peaks else {}),
        rows,
        settings_of(options) | {"limit": limit, "memory_kept": kept},
        [f"The FLOPs of the adapters alone make {limit:.3f} of the frozen base's. Brackets: quartiles turn by turn."],
    )  # fmt: skip


if __name__ == "__main__":
    asked = parse()
    measure(asked).show(asked.json)
