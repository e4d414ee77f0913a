"""The snippets of a card run, as they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, randomize, tiny_llama, token_ids
from hub.cards import content, save_tokenizer
from huggingface_hub import ModelCard
from torch import Tensor

from hf_lora import LoraConfig, LoraModel, apply_lora, build_classifier, write_card


def run_snippets(folder: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run each Python block of a card by itself; the names that it loads are folders here."""
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"^```python\n(.*?)^```", content(folder), re.MULTILINE | re.DOTALL)
    results = []
    for block in blocks:
        for name, path in names.items():
            block = block.replace(json.dumps(name), json.dumps(path))
        values: dict[str, Any] = {}
        exec(compile(block, "a snippet of the card", "exec"), values)
        results.append(values)
    return results


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def test_the_snippets_of_a_classifier_run(
    trained: Any, bert_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = trained.output_dir
    expected = logits(trained.model)
    found = run_snippets(folder, {"my-adapter": str(folder), "bert-base": str(bert_base)}, monkeypatch)
    own, merged, piped, peft = found
    assert isinstance(own["model"], LoraModel)
    assert torch.equal(logits(own["model"]), expected)
    assert own["tokenizer"]("open the door")["input_ids"] == [3, 5, 6]
    assert not isinstance(merged["model"], LoraModel)
    assert_near(logits(merged["model"]), expected, torch.float32, 40)
    assert (folder.parent / "merged" / "model.safetensors").is_file()
    assert piped["pipe"]("open the door")[0]["label"] in ("yes", "no")
    assert "score" in capsys.readouterr().out
    assert_near(logits(peft["model"]), expected, torch.float32, 40)


def test_the_snippets_of_a_pooled_classifier_run_and_its_biases_are_no_whole_modules(
    bert_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT needs the class of hf_lora: an auto class of transformers has another head."""
    model = build_classifier(str(bert_base), ["no", "yes"], pooling="mean")
    model = randomize(apply_lora(model, LoraConfig(r=4, bias="all")))
    folder = tmp_path / "pooled"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    write_card(folder, repo_id="somebody/pooled", base_model="someone/base")
    names = {"somebody/pooled": str(folder), "someone/base": str(bert_base)}
    own, merged, _, peft = run_snippets(folder, names, monkeypatch)
    expected = logits(model)
    assert torch.equal(logits(own["model"]), expected)
    assert_near(logits(merged["model"]), expected, torch.float32, 40)
    assert_near(logits(build_classifier(str(tmp_path / "merged"))), expected, torch.float32, 40)
    assert_near(logits(peft["model"]), expected, torch.float32, 40)
    assert "| Fully trained | `pooled_classifier.out_proj` |" in content(folder)
    assert "and all weights of `pooled_classifier.out_proj`; it" in content(folder)


def test_the_snippets_of_a_causal_language_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base-of-mine")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base-of-mine")
    model = randomize(apply_lora(model, LoraConfig(r=4)))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    write_card(folder, repo_id="somebody/their-adapter", base_model="someone/their-base")
    names = {"somebody/their-adapter": str(folder), "someone/their-base": str(tmp_path / "base-of-mine")}
    own, merged, piped, peft = run_snippets(folder, names, monkeypatch)
    expected = logits(model)
    assert torch.equal(logits(own["model"]), expected)
    assert_near(logits(merged["model"]), expected, torch.float32, 40)
    assert piped["pipe"].task == "text-generation"
    assert "generated_text" in capsys.readouterr().out
    assert_near(logits(peft["model"]), expected, torch.float32, 40)


def test_a_base_from_the_hub_is_found_by_the_adapter_itself(adapter: Path) -> None:
    config, extras = (json.loads((adapter / n).read_text()) for n in ("adapter_config.json", "hf_lora.json"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    (adapter / "hf_lora.json").write_text(json.dumps(extras | {"base": {"name": "org/base", "commit": commit}}))
    write_card(adapter)
    text = content(adapter)
    assert 'LoraModel.from_pretrained("three")' in text
    assert f'from_pretrained("org/base", num_labels=3, revision="{commit}")' in text
    assert ModelCard.load(adapter / "README.md").data.base_model == "org/base"
    (adapter / "hf_lora.json").write_text(json.dumps(extras | {"base": {"name": "org/base", "files": "00"}}))
    write_card(adapter)  # a folder that is no longer here
    assert ModelCard.load(adapter / "README.md").data.base_model is None
    assert "huggingface.co/org" not in content(adapter)
