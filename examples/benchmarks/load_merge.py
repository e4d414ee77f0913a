"""Injection, loading, switching, disabling and merging: hf_lora compared with PEFT, alternating in one process.

    python examples/benchmarks/load_merge.py --preset cpu
    python examples/benchmarks/load_merge.py --preset cpu --merge-layers 4 --targets 224 --json out/load_merge.json

Every model is Llama-shaped with random weights, created from a config before timing; B is random when it is merged.
Prints the ratio of hf_lora's median time to PEFT's, and the limit: for injection and loading the creation of the
factors, for merging one copy of the adapted weights. The extra peak memory of
merge_and_unload is measured in a separate process for each library.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import common
import torch
from common import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lora import LoraConfig, apply_lora

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(device="cpu", hidden=2048, mlp=5632, kv_heads=4, merge_layers=19, threads=1, repeats=5),  # 1.7 GB
    "h200": dict(device="cuda", hidden=4096, mlp=14336, kv_heads=8, merge_layers=32, threads=8, repeats=9),  # 14 GB
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Times = dict[str, list[float]]


def llama(hidden: int, mlp: int, layers: int, kv_heads: int, device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=kv_heads, tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def tiny(targets: int, device: str) -> Any:
    return llama(64, 176, targets // len(LINEAR), 1, device, torch.float32)


def ours(model: Any, rank: int) -> Any:
    return apply_lora(model, LoraConfig(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM"))


def peft_config(rank: int) -> Any:
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")


def theirs(model: Any, rank: int) -> Any:
    import peft

    return peft.get_peft_model(model, peft_config(rank))


def randomize(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def factors(model: Any, rank: int) -> list[nn.ModuleList]:
    """The minimum of any injection: two modules with a float32 parameter each, A random and B zero."""
    made = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not model.lm_head:
            pair = nn.ModuleList([nn.Module(), nn.Module()])
            a = torch.empty(rank, layer.in_features, device=layer.weight.device)
            pair[0].weight = nn.Parameter(a.uniform_(-0.1, 0.1))
            pair[1].weight = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
            made.append(pair)
    return made


def seconds(action: Callable[[], Any]) -> float:
    gc.collect()
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def injection(targets: int, options: argparse.Namespace) -> Times:
    model = tiny(targets, options.device)
    times: Times = {"ours": [], "PEFT": [], "limit": []}
    held: list[Any] = []
    for turn in range(options.repeats + 1):  # the first one warms up
        found = {
            "ours": seconds(lambda: ours(model, options.rank)),
            "unload": seconds(lambda: model.unload()),
            "limit": seconds(lambda: factors(model, options.rank)),
        }
        found["PEFT"] = seconds(lambda: held.append(theirs(model, options.rank)))
        held.pop().unload()
        if turn:
            for name in times:
                times[name].append(found[name])
    return times


def loading_and_switching(targets: int, options: argparse.Namespace, folder: Path) -> dict[str, Times]:
    """Loading a second and a third adapter, switching between them, and a `with` block without any."""
    mine = ours(tiny(targets, options.device), options.rank).eval()
    peft = theirs(tiny(targets, options.device), options.rank).eval()
    randomize(mine).save_pretrained(folder / "ours")
    randomize(peft).save_pretrained(folder / "peft")
    table: dict[str, Times] = {}

    def note(what: str, name: str, action: Callable[[], Any]) -> None:
        table.setdefault(what, {}).setdefault(name, []).append(seconds(action))

    def block(model: Any) -> None:
        with model.disable_adapter():
            pass

    for _ in range(options.repeats):
        for nth in ("2nd", "3rd"):
            note(f"load a {nth} adapter", "ours", partial(mine.load_adapter, folder / "ours", nth))
            note(f"load a {nth} adapter", "PEFT", partial(peft.load_adapter, str(folder / "peft"), nth))
            note(f"load a {nth} adapter", "limit", lambda: factors(mine, options.rank))
        for name in ("default", "2nd", "default"):
            note("switch", "ours", partial(mine.set_adapter, name))
            note("switch", "PEFT", partial(peft.set_adapter, name))
        for _ in range(3):
            note("disable and enable", "ours", lambda: block(mine))
            note("disable and enable", "PEFT", lambda: block(peft))
        for nth in ("2nd", "3rd"):
            mine.delete_adapter(nth)
            peft.delete_adapter(nth)
    return table


def big(options: argparse.Namespace) -> Any:
    o = options
    return llama(o.hidden, o.mlp, o.merge_layers, o.kv_heads, o.device, getattr(torch, o.dtype))


def merging(options: argparse.Namespace) -> Times:
    """Both libraries merge a new adapter into the same weights, one after the other."""
    model = big(options)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    scratch = torch.empty(max(w.numel() for w in weights), dtype=weights[0].dtype, device=weights[0].device)
    times: Times = {"ours": [], "PEFT": [], "limit": []}

    def copy() -> None:
        for weight in weights:
            scratch[: weight.numel()].copy_(weight.detach().view(-1))

    for _ in range(options.repeats):
        for name, inject in (("ours", ours), ("PEFT", theirs)):
            adapted = randomize(inject(model, options.rank))
            times[name].append(seconds(adapted.merge_and_unload))
            del adapted
        times["limit"].append(seconds(copy))
    return times


def peak_of_merge(library: str, options: argparse.Namespace) -> int:
    """Bytes by which merge_and_unload raises the peak memory of this process (on CUDA: of the device)."""
    adapted = randomize((ours if library == "ours" else theirs)(big(options), options.rank))
    small = randomize((ours if library == "ours" else theirs)(tiny(14, options.device), 4))
    small.merge_and_unload()  # so that one-time initialization of a library does not count
    gc.collect()
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        adapted.merge_and_unload()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    adapted.merge_and_unload()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith(field))
    return int(line.split()[1]) * 1024


def peaks(options: argparse.Namespace) -> dict[str, int]:
    found = {}
    for library in ("ours", "PEFT"):
        words = [sys.executable, __file__, *sys.argv[1:], "--peak-of", library]
        found[library] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def table_of(results: dict[str, Times], peak: dict[str, int] | None, options: argparse.Namespace) -> Table:
    rows: list[dict[str, Any]] = []
    for what, times in results.items():
        ours, theirs = common.Times(times["ours"]), common.Times(times["PEFT"])
        spread = ours.over(theirs)
        limit = f"{common.Times(times['limit']).median / theirs.median:.3f}" if "limit" in times else None
        rows.append(
            {
                "what": what,
                "ratio": f"{spread.value:.4f}",
                "quartiles": f"{spread.low:.4f}-{spread.high:.4f}",
                "limit": limit,
                "seconds": f"{theirs.median:.3g}",
            }
        )
    columns = {
        "what": "",
        "ratio": "hf_lora over PEFT",
        "quartiles": "quartiles",
        "limit": "limit over PEFT",
        "seconds": "PEFT, s",
    }
    notes = []
    if peak:
        mine, other = peak["ours"] / 1e6, peak["PEFT"] / 1e6
        notes.append(f"Extra peak memory of merge_and_unload: hf_lora {mine:.1f} MB, PEFT {other:.1f} MB.")
    title = f"Injection, loading, switching and merging at rank {options.rank}"
    settings = {k: v for k, v in common.settings_of(options).items() if k != "peak_of"}
    return Table("load_merge", title, columns, rows, settings, notes)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--targets", type=int, nargs="*", default=[224, 896, 3584], help="adapted layers of each model"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="for merging")
    parser.add_argument("--merge-layers", type=int, help="layers of the model to merge; 0 skips the merge")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--peak-of", choices=["ours", "PEFT"], help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def measure(options: argparse.Namespace) -> Table:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    results: dict[str, Times] = {}
    for targets in options.targets:
        results[f"inject {targets} targets"] = injection(targets, options)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            for what, times in loading_and_switching(targets, options, Path(folder)).items():
                results[f"{what}, {targets} targets"] = times
    peak = None
    if options.merge_layers:
        results[f"merge_and_unload, {options.dtype}"] = merging(options)
        peak = peaks(options)
    return table_of(results, peak, options)


if __name__ == "__main__":
    asked = parse()
    if asked.peak_of:
        torch.set_num_threads(asked.threads)
        print(peak_of_merge(asked.peak_of, asked))
    else:
        measure(asked).show(asked.json)
