"""Classifiers on a sentence vector: the feature is sentence-transformers' own, and nothing loses it on the way."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from pooled.conftest import ALL, DECLARED, LABELS, logits, tokens

import hf_lora
from hf_lora import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError, apply_lora, build_classifier
from hf_lora.pooled.declared import declared_pooling
from hf_lora.pooled.pooling import MODES, Pooling
from hf_lora.testing import LocalHub

st = pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_is_that_of_sentence_transformers(mode: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    torch.manual_seed(0)
    hidden = torch.randn(5, 7, 6, dtype=torch.float64)
    for left in (False, True):
        mask = (torch.arange(7) < torch.tensor([[1], [7], [3], [4], [6]])).long()
        mask = mask.flip(1) if left else mask
        if mode == "cls" and left:  # theirs is then the vector of padding
            expected = hidden[torch.arange(5), mask.argmax(1)]
        else:
            theirs = Theirs(6, mode)({"token_embeddings": hidden, "attention_mask": mask})
            expected = theirs["sentence_embedding"]
        torch.testing.assert_close(Pooling((mode,)).vector(hidden, mask), expected, rtol=1e-14, atol=1e-14)
    whole = Pooling((mode,)).vector(hidden, None)
    torch.testing.assert_close(whole, Pooling((mode,)).vector(hidden, torch.ones(5, 7).long()))


@pytest.mark.parametrize("name", DECLARED)
def test_a_classifier_reads_the_vector_that_its_checkpoint_declares(name: str, declared: dict[str, str]) -> None:
    folder = declared[name]
    assert declared_pooling(folder) == DECLARED[name]
    model = build_classifier(folder, LABELS).eval()
    read: list[torch.Tensor] = []
    model.pooled_classifier.out_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    logits(model, tokens(folder)[1])
    expected = st.SentenceTransformer(folder, device="cpu").encode(ALL, convert_to_tensor=True, batch_size=len(ALL))
    torch.testing.assert_close(read[0], expected, rtol=1e-5, atol=1e-6)
    assert list(model.config.label2id) == LABELS


def test_a_named_pooling_is_preferred_and_a_checkpoint_that_declares_none_keeps_its_class(
    base: str, declared: dict[str, str]
) -> None:
    assert build_classifier(declared["normalized"], 3, pooling="max").config.pooling["modes"] == ["max"]
    assert type(build_classifier(base, 3)).__name__ == "BertForSequenceClassification"
    own = build_classifier(declared["normalized"], 3, pooling="own")
    assert type(own).__name__ == "BertForSequenceClassification"
    for wrong in ({"labels": None}, {"labels": None, "pooling": "mean"}):
        with pytest.raises(ConfigError, match="Pass labels="):
            build_classifier(base, **wrong)
    with pytest.raises(ConfigError, match=r"'meen' is unknown \(did you mean 'mean'"):
        build_classifier(base, 3, pooling="meen")


def test_the_class_of_transformers_is_used_where_it_reads_the_same(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel

    common: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    LlamaModel(LlamaConfig(**common, pad_token_id=0)).save_pretrained(tmp_path / "last")
    assert type(build_classifier(tmp_path / "last", 3, pooling="last")).__name__ == "LlamaForSequenceClassification"
    ModernBertModel(ModernBertConfig(**common, pad_token_id=0)).save_pretrained(tmp_path / "both")
    for mode in ("mean", "cls"):
        model = build_classifier(tmp_path / "both", 3, pooling=mode)
        assert type(model).__name__ == "ModernBertForSequenceClassification"
        assert model.config.classifier_pooling == mode
        folder = tmp_path / f"adapter-{mode}"
        randomize(apply_lora(model, LoraConfig(r=2))).save_pretrained(folder)
        ids = torch.randint(1, 40, (2, 6))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        again = LoraModel.from_pretrained(folder)
        assert again.config.classifier_pooling == mode
        torch.testing.assert_close(logits(again, batch), logits(model, batch))


FRESH = """
import sys, torch
from hf_lora import LoraModel, pipeline
folder, batch = sys.argv[1], torch.load(sys.argv[2])
model = LoraModel.from_pretrained(folder).eval()
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[3])
"""


@pytest.mark.parametrize("name", ["normalized", "dense"])
def test_nothing_loses_the_vector(
    name: str, declared: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved, loaded, merged in memory and by files, pickled, pushed and pulled, in PEFT, exported: equal logits."""
    tokenizer, batch = tokens(declared[name])
    model = randomize(apply_lora(build_classifier(declared[name], LABELS), LoraConfig(r=2)))
    expected = logits(model, batch)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 60_000

    def same(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    again = LoraModel.from_pretrained(folder)
    same(logits(again, batch))
    same(logits(pickle.loads(pickle.dumps(again)), batch))
    merged = again.merge_and_unload()
    same(logits(merged, batch))
    merged.save_pretrained(tmp_path / "merged")
    hf_lora.merge_files(declared[name], folder, tmp_path / "files")
    for whole in ("merged", "files"):
        tokenizer.save_pretrained(tmp_path / whole)
        same(logits(hf_lora.load_for_generation(tmp_path / whole, any_task=True)[0], batch))
        saved = build_classifier(tmp_path / whole)
        same(logits(saved, batch))
        assert list(saved.config.id2label.values()) == LABELS
    exported = hf_lora.save_as_sentence_transformer(merged, tokenizer, tmp_path / "exported")
    theirs = st.SentenceTransformer(str(exported), device="cpu").encode(ALL, convert_to_tensor=True)
    same(theirs)
    logging.getLogger("transformers.pipelines.base").addHandler(caplog.handler)
    rows = hf_lora.pipeline("text-classification", folder)(ALL, top_k=None)
    assert "is not supported" not in caplog.text, "transformers lists all classes that it knows"
    for row, values in zip(rows, expected.softmax(-1), strict=True):
        assert {r["label"]: pytest.approx(r["score"], abs=1e-5) for r in row} == dict(
            zip(LABELS, values.tolist(), strict=True)
        )
    peft = pytest.importorskip("peft")
    same(logits(peft.PeftModel.from_pretrained(build_classifier(declared[name], LABELS), folder), batch))
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        hub.add_repo("user/base", declared[name])
        hub.add_repo("user/ad", folder)
        same(logits(LoraModel.from_pretrained("user/ad"), batch))
        same(logits(LoraModel.from_pretrained("user/ad", base_model="user/base"), batch))
        assert build_classifier("user/base", LABELS).config.pooling == model.config.pooling


def test_a_fresh_process_gives_the_same_logits(declared: dict[str, str], tmp_path: Path) -> None:
    _, batch = tokens(declared["normalized"])
    model = randomize(apply_lora(build_classifier(declared["normalized"], LABELS), LoraConfig(r=2)))
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    torch.save(batch, tmp_path / "batch.pt")
    words = [tmp_path / "adapter", tmp_path / "batch.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, words)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, batch))


def test_peft_does_not_open_the_adapter_over_another_class(declared: dict[str, str], tmp_path: Path) -> None:
    """Its head has another name, so that it is not put over another feature silently."""
    peft = pytest.importorskip("peft")
    model = randomize(apply_lora(build_classifier(declared["normalized"], LABELS), LoraConfig(r=2)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mpnet", "t5", "gpt2", "llama"])
def test_every_body_can_be_pooled(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "pad_token_id": 0,
    }  # fmt: skip
    names = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    }
    kept = {"vocab_size", "pad_token_id"} if kind in names else set(sizes)
    config = AutoConfig.for_model(kind, **{k: v for k, v in sizes.items() if k in kept}, **names.get(kind, {}))
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    model = build_classifier(tmp_path / "base", 3, pooling="max")
    ids = torch.randint(2, 40, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    randomize(apply_lora(model, LoraConfig(r=2)))
    expected = logits(model, batch)
    loss = model(**batch, labels=torch.tensor([0, 2])).loss
    torch.testing.assert_close(loss.detach(), torch.nn.functional.cross_entropy(expected, torch.tensor([0, 2])))
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(LoraModel.from_pretrained(tmp_path / "adapter"), batch), expected)


# The command --------------------------------------------------------------------------------------------------------


def run(folder: str, rows: Path, out: Path, **options: Any) -> Any:
    lines: list[str] = []
    result = hf_lora.finetune(
        {
            "model": folder, "train_file": str(rows), "test_file": str(rows), "output_dir": str(out), "use_cpu": True,
            "disable_tqdm": True, "save_strategy": "no", "max_steps": 3, **options,
        },
        lines.append,
    )  # fmt: skip
    return result, "\n".join(lines)


def test_training_takes_the_declared_vector_and_starts_at_the_means(
    declared: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    result, text = run(declared["normalized"], rows, tmp_path / "means", learning_rate=1e-9)
    assert result.model.config.pooling == DECLARED["normalized"].to_json()
    assert "the head starts at the class means: loss 0." in text
    assert "(chance: 1.10)" in text
    assert result.metrics["test_accuracy"] == 1.0  # before any step
    plain, text = run(declared["normalized"], rows, tmp_path / "random", learning_rate=1e-9, head_init="random")
    assert "class means" not in text
    assert plain.metrics["test_loss"] > result.metrics["test_loss"] + 0.2
    scored = hf_lora.evaluate(str(tmp_path / "means"), rows)
    assert scored.metrics["accuracy"] == 1.0
    own, _ = run(declared["normalized"], rows, tmp_path / "cls", pooling="cls")
    assert own.model.config.pooling == Pooling(("cls",)).to_json()


def test_an_adapter_that_goes_on_keeps_its_pooling(declared: dict[str, str], rows: Path, tmp_path: Path) -> None:
    """Whatever its checkpoint declares."""
    first, _ = run(declared["mean"], rows, tmp_path / "first", pooling="max")
    again, text = run(declared["mean"], rows, tmp_path / "again", lora_adapter=str(tmp_path / "first"))
    assert again.model.config.pooling == first.model.config.pooling == Pooling(("max",)).to_json()
    assert "max (as in the adapter)" in text
    with pytest.raises(AdapterFileError, match="Pass that pooling"):
        run(declared["mean"], rows, tmp_path / "cls", lora_adapter=str(tmp_path / "first"), pooling="cls")


@pytest.mark.parametrize("labels", [[], 0, -1, ["a", "a"], "ab"])
def test_labels_that_are_no_classes_are_refused(labels: Any, declared: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be the names of the classes"):
        build_classifier(declared["mean"], labels)


def test_a_pooling_that_cannot_be_used_is_refused(declared: dict[str, str], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'meen' is unknown"):
        run(declared["mean"], rows, tmp_path / "a", pooling="meen")
    assert not (tmp_path / "a").exists()


# Files ---------------------------------------------------------------------------------------------------------------


def test_odd_files_of_a_checkpoint_are_said_and_its_own_class_is_used(
    declared: dict[str, str], tmp_path: Path, caplog: Any
) -> None:
    import shutil

    from transformers.utils import logging

    logging.enable_propagation()
    changes: list[tuple[str, Any]] = [
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.WordWeights", "path": "1_Pooling"}]),
        ("modules.json", {"type": "none"}),
        ("1_Pooling/config.json", {"pooling_mode": "median"}),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}),
        ("1_Pooling/config.json", None),
    ]
    try:
        for i, (file, values) in enumerate(changes):
            folder = Path(shutil.copytree(declared["normalized"], tmp_path / str(i)))
            (folder / file).unlink() if values is None else (folder / file).write_text(json.dumps(values))
            caplog.clear()
            assert declared_pooling(folder) is None
            assert "cannot be built here" in caplog.text
    finally:
        logging.disable_propagation()
    (tmp_path / "0" / "modules.json").write_text("{")
    assert declared_pooling(tmp_path / "0") is None
    for old in ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, {}):
        (tmp_path / "1" / "modules.json").write_text(Path(declared["normalized"], "modules.json").read_text())
        (tmp_path / "1" / "1_Pooling" / "config.json").write_text(json.dumps(old))
        found = declared_pooling(tmp_path / "1")
        assert found == replace(DECLARED["normalized"], modes=("cls", "max") if old else ("mean",))


def test_an_adapter_of_another_pooling_is_refused(declared: dict[str, str], tmp_path: Path) -> None:
    """Also where all tensors fit."""
    path = declared["normalized"]
    model = randomize(apply_lora(build_classifier(path, LABELS, pooling="mean"), LoraConfig(r=2)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    for pooling, said in (("cls", "this model's reads cls"), ("own", "this model's class has its own way")):
        other = build_classifier(path, LABELS, pooling=pooling)
        with pytest.raises(AdapterFileError, match=f"classifier reads mean, and {said}"):
            LoraModel.from_pretrained(tmp_path, base_model=other)
        assert not hasattr(other, "lora_configs")
    LoraModel.from_pretrained(tmp_path, base_model=build_classifier(path, LABELS, pooling="mean"))


def test_a_broken_pooling_in_a_file_is_refused(declared: dict[str, str], tmp_path: Path) -> None:
    model = randomize(apply_lora(build_classifier(declared["normalized"], LABELS), LoraConfig(r=2)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "hf_lora.json"
    values = json.loads(file.read_text())
    for wrong in ({"modes": ["mean"]}, {**values["pooling"], "modes": ["os"]}, {**values["pooling"], "dense": [1]}, 3):
        file.write_text(json.dumps({**values, "pooling": wrong}))
        with pytest.raises(AdapterFileError):
            LoraModel.from_pretrained(tmp_path)
    del values["pooling"]
    file.write_text(json.dumps(values))
    with pytest.raises((AdapterFileError, ConfigError), match="pooling"):
        LoraModel.from_pretrained(tmp_path)


def test_an_export_refuses_what_is_not_a_plain_classifier(declared: dict[str, str], tmp_path: Path) -> None:
    model = build_classifier(declared["mean"], LABELS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        hf_lora.save_as_sentence_transformer(model, tokens(declared["mean"])[0], tmp_path / "full")
    apply_lora(model, LoraConfig(r=2))
    with pytest.raises(StateError, match="merge_and_unload"):
        hf_lora.save_as_sentence_transformer(model, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
