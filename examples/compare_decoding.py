"""Time greedy decoding with an adapter: the base, hf_lora unmerged and merged, and PEFT, interleaved in one process.

    python examples/compare_decoding.py --tokens 128 --repeats 5

The adapter is random (B is not zero), so the time is that of a trained one. Prints the median seconds, and their ratio
to the base's, for batches of 1 and 8 prompts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lora import LoraConfig, LoraModel, apply_lora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", help="folder of the base model; not given: written from the package")
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
options = parser.parse_args()
torch.set_num_threads(options.threads)
folder = options.base or base_folder()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


from peft import PeftModel  # noqa: E402  # after transformers

adapted = apply_lora(load(), LoraConfig(r=options.rank, task_type="CAUSAL_LM"))
torch.manual_seed(0)
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.003)
adapted.eval().save_pretrained("out/compare_decoding")
models = {
    "base": load(),
    "hf_lora": adapted,
    "hf_lora merged": copy.deepcopy(adapted).merge_and_unload(),
    "PEFT": PeftModel.from_pretrained(load(), "out/compare_decoding").eval(),
}
models["base again"] = models["base"]
assert isinstance(adapted, LoraModel)
prompts = ["What is the capital of France?", "Name three fruits.", "Describe the sea.", "How do bees fly?"] * 2
for batch in options.batch:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[:batch]]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    times: dict[str, list[float]] = {name: [] for name in models}
    texts = {}
    for _ in range(options.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.no_grad():
                out = model.generate(
                    **inputs, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False
                )
            times[name].append(time.perf_counter() - start)
            texts[name] = out.tolist()
    base = statistics.median(times["base"][1:])
    print(f"batch {batch}, {options.tokens} tokens, rank {options.rank}, {options.threads} threads")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"  {name:15s} {median:7.2f} s  {median / base:5.2f}")
    same = [name for name in ("hf_lora merged", "PEFT") if texts[name] == texts["hf_lora"]]
    print(f"  the same text as hf_lora: {', '.join(same)}")
