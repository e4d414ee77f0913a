"""Memory of training a LoRA adapter over an NF4 base: PEFT's documented method and hf_lora, one process for each.

    python examples/benchmarks/quantized_memory.py [--base FOLDER] [--rows 2 --tokens 512]

The base is SmolLM2-135M-Instruct, quantized while loading (double quantization, bfloat16 for the rest). PEFT's method
is `prepare_model_for_kbit_training`, which casts all other weights to float32, then `get_peft_model`, under bfloat16
autocast, as documented. The method of hf_lora is `apply_lora`. The third one is PEFT without the preparation. All
adapt the same layers with the same rank, and run two steps of AdamW. The bytes of the weights are exact. The peak is
the operating system's count of resident memory over the two steps, also given without the memory before them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Table, arguments, device_of, settings_of

METHODS = {"peft": "PEFT, prepared as documented", "peft_bare": "PEFT, not prepared", "ours": "hf_lora"}
MIB = 1 << 20


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--base", help="a folder of a causal language model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "CHECKPOINTING"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def load(folder: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    method = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=method, dtype=torch.bfloat16, device_map={"": device}
    )


def prepare(method: str, model: Any, rank: int, checkpointing: bool) -> Any:
    if method == "ours":
        from hf_lora import LoraConfig, apply_lora

        apply_lora(model, LoraConfig(r=rank))
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        return model.train()
    import peft

    if method == "peft":
        model = peft.prepare_model_for_kbit_training(model, checkpointing, dict(use_reentrant=False))
    elif checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def frozen_bytes(model: Any) -> dict[str, int]:
    """Bytes of the frozen parameters by dtype."""
    found: dict[str, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            kind = str(parameter.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + parameter.numel() * parameter.itemsize
    return found


def measure_one(options: argparse.Namespace, method: str, checkpointing: bool) -> dict[str, Any]:
    """Two steps in this process."""
    device = device_of(options)
    model = load(options.base, device)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model = prepare(method, model, options.rank, checkpointing)
    dtypes = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    upcast = sum(
        p.numel() * (p.itemsize - before[n].itemsize) for n, p in dtypes.items() if before.get(n, p.dtype) != p.dtype
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (options.rows, options.tokens), device=device)
    start = held(device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=method == "peft"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"frozen": frozen_bytes(model), "upcast": upcast, "ready": start, "peak": peak(device), "loss": loss.item()}


def held(device: torch.device) -> int:
    """Bytes in use now, from which the peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(li for li in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if li.startswith(name))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace, words: list[str]) -> Table:
    if options.preset == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("The peak of resident memory is read from /proc, which this system lacks. Try --preset h200.")
    rows = []
    for checkpointing in (False, True):
        for method, name in METHODS.items():
            command = [sys.executable, __file__, *words, "--base", options.base, "--one", method, str(checkpointing)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                {
                    "method": name,
                    "checkpointing": "on" if checkpointing else "off",
                    "frozen": f"{sum(found['frozen'].values()) / MIB:.1f}",
                    "upcast": f"{found['upcast'] / MIB:.1f}",
                    "step": f"{(found['peak'] - found['ready']) / MIB:.0f}",
                    "peak": f"{found['peak'] / MIB:.0f}",
                    "loss": f"{found['loss']:.3f}",
                    "bytes": found,
                }
            )
    return Table(
        "quantized_memory",
        f"Two steps over an NF4 base, {options.rows} x {options.tokens} tokens, rank {options.rank}",
        {
            "method": "method", "checkpointing": "checkpointing", "frozen": "frozen weights, MiB",
            "upcast": "added by casts, MiB", "step": "a step adds, MiB", "peak": "peak of the process, MiB",
            "loss": "loss",
        },
        rows,
        settings_of(options),
    )  # fmt: skip


def main() -> None:
    options = parse()
    if options.base is None:
        from smollm2 import base_folder

        options.base = str(base_folder())
    if options.one:
        method, checkpointing = options.one
        print(json.dumps(measure_one(options, method, checkpointing == "True")))
        return
    measure(options, sys.argv[1:]).show(options.json)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))  # for smollm2.py
    main()
