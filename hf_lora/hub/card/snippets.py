"""The snippets of a card: each stands for itself, and runs as it is where its names can be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...adapt.labels import AUTO_CLASSES
from .card_data import Adapter
from .escape import literal

PARTS = {
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}
"""A file of an adapter's folder -> the class that loads it."""

PIPELINE_INPUTS = {
    "text-classification": "A text to classify.",
    "token-classification": "A text with names in it.",
    "text-generation": "The beginning of a text",
}
"""Tasks of `pipeline` that take one text, each with such a text."""


@dataclass
class Snippet:
    """A block of Python with what it shows."""

    title: str
    code: str


def snippets_for(
    folder: Path, facts: Adapter, adapter: str, base: str | None, base_is_found: bool, task: str | None
) -> list[Snippet]:
    """Loading with hf_lora, merged, through a pipeline, and with PEFT.

    Args:
        adapter: the repository, or the folder's name.
        base: the base's repository, or its folder's name.
        base_is_found: whether the adapter's own configuration leads to it, wherever the adapter is loaded.
    """
    config, architecture = facts.config, str(facts.extras.get("architecture") or "")
    where = literal(adapter)
    plain_module = config.task_type is None and not _is_of_transformers(architecture)
    more = (
        ""
        if base_is_found
        else ", base_model=model"
        if plain_module
        else f", base_model={literal(base)}"
        if base
        else ""
    )
    tokens = (folder / "tokenizer_config.json").is_file()
    found = [
        Snippet(
            "With hf_lora" + (", onto `model`, the base as it was built for the training" if plain_module else ""),
            f"from hf_lora import LoraModel\n\nmodel = LoraModel.from_pretrained({where}{more})",
        )
    ]
    if plain_module:
        return found
    if tokens:
        found[0].code = found[0].code.replace(
            "from hf_lora import LoraModel\n",
            "from hf_lora import LoraModel\nfrom transformers import AutoTokenizer\n",
        )
        found[0].code += f"\ntokenizer = AutoTokenizer.from_pretrained({where})"
    found.append(
        Snippet(
            "Merged into the base, which is then a plain model of transformers without an adapter",
            "from hf_lora import LoraModel\n\n"
            f"model = LoraModel.from_pretrained({where}{more}, merge=True)\n"
            'model.save_pretrained("merged")',
        )
    )
    if task in PIPELINE_INPUTS and tokens:
        found.append(
            Snippet(
                "As a pipeline",
                f"from hf_lora import pipeline\n\npipe = pipeline({literal(task)}, {where}{more})\n"
                f"print(pipe({literal(PIPELINE_INPUTS[task])}))",
            )
        )
    if base:
        found.append(Snippet("With PEFT", _peft(facts, where, literal(base), architecture)))
    return found


def _peft(facts: Adapter, adapter: str, base: str, architecture: str) -> str:
    auto = AUTO_CLASSES.get(facts.config.task_type or "", architecture)
    labels, commit = facts.extras.get("num_labels"), (facts.extras.get("base") or {}).get("commit")
    words = [base]
    if isinstance(labels, int) and "Classification" in auto:
        words.append(f"num_labels={labels}")
    if isinstance(commit, str):
        words.append(f"revision={literal(commit)}")
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({', '.join(words)})\n"
        f"model = PeftModel.from_pretrained(base, {adapter})"
    )


def _is_of_transformers(architecture: str) -> bool:
    import transformers

    return bool(architecture) and architecture.isidentifier() and hasattr(transformers, architecture)
