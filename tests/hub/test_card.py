"""The card of an adapter: its numbers are those of the run and the files, and who writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import randomize
from hub.cards import content, make_trainer, table
from huggingface_hub import EvalResult, ModelCard, metadata_eval_result
from safetensors.torch import load_file

from hf_lora import AdapterFileError, write_card

# True numbers --------------------------------------------------------------------------------------------------------


def test_the_results_read_back_are_those_that_were_measured(trained: Any) -> None:
    card = ModelCard.load(trained.output_dir / "README.md")
    read = {result.metric_type: result for result in card.data.eval_results}
    measured = {name: trained.metrics[f"test_{name}"] for name in ("loss", "accuracy", "f1")}
    assert {name: result.metric_value for name, result in read.items()} == measured
    assert {(r.task_type, r.dataset_name) for r in read.values()} == {("text-classification", "held out.csv")}
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.pipeline_tag == "text-classification"
    assert {"lora", "hf_lora", "text-classification"} <= set(card.data.tags)
    for name, value in measured.items():
        assert f"| {'F1' if name == 'f1' else name.capitalize()} | held out.csv | {value:.4g} |" in card.text


def test_the_metadata_are_those_that_the_hubs_own_function_makes(adapter: Path) -> None:
    given = EvalResult("text-classification", "user/intents", "Intents", "accuracy", 0.8125, dataset_split="test")
    write_card(adapter, results=[given], base_model="some/base", license="mit")
    data = yaml.safe_load(content(adapter).split("---\n")[1])
    expected = metadata_eval_result(
        model_pretty_name="three", task_pretty_name="x", task_id="text-classification", metrics_pretty_name="Accuracy",
        metrics_id="accuracy", metrics_value=0.8125, dataset_pretty_name="Intents", dataset_id="user/intents",
        dataset_split="test",
    )["model-index"]  # fmt: skip
    del expected[0]["results"][0]["task"]["name"]
    del expected[0]["results"][0]["metrics"][0]["verified"]
    assert data["model-index"] == expected
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("some/base", "adapter", "mit")
    assert "base_model:adapter:some/base" in data["tags"]


def test_the_configuration_is_the_files_and_the_runs(trained: Any) -> None:
    folder = trained.output_dir
    rows, tensors = table(content(folder)), load_file(folder / "adapter_model.safetensors")
    layers = {key.rpartition(".lora_A")[0] for key in tensors if ".lora_A" in key}
    assert rows["Parameters of the adapter"] == f"{sum(t.numel() for t in tensors.values()):,}"
    assert rows["File size"] == f"{(folder / 'adapter_model.safetensors').stat().st_size:,} bytes"
    assert rows["Adapted layers"].startswith(f"{len(layers)}: ")
    trainable = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trained.model.parameters())
    assert rows["Trained"] == f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.3g} %)"
    expected = {
        "Rank r": "4", "Alpha": "4; other layers 2", "Learning rate": "0.003", "Epochs": "3", "Steps": "18",
        "Seed": "7", "Batch": "4 rows", "Rows trained on": "24", "Schedule": "linear",
        "Precision": "base in float32", "torch": torch.__version__,
    }  # fmt: skip
    assert {name: rows[name] for name in expected} == expected


def test_a_card_of_files_alone_tells_no_more_than_they_do(adapter: Path) -> None:
    write_card(adapter)
    text = content(adapter)
    assert "## Results" not in text
    assert "The command" not in text
    assert not {"Learning rate", "Trained", "Seed", "Hardware", "Base model"} & table(text).keys()
    assert table(text)["Rank r"] == "4"
    assert "model-index" not in ModelCard.load(adapter / "README.md").data.to_dict()


def test_a_value_that_is_not_finite_stands_in_the_table_alone(adapter: Path) -> None:
    write_card(adapter, results={"eval_loss": float("nan"), "eval_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 1.0})
    assert "| Loss | eval | nan |" in content(adapter)
    found = ModelCard.load(adapter / "README.md").data.eval_results
    assert [(r.metric_type, r.metric_value) for r in found] == [("accuracy", 0.5)]
    given = {"task_type": "t", "dataset_type": "d", "dataset_name": "D"}
    given |= {"metric_type": "perplexity", "metric_value": float("inf")}
    write_card(adapter, results=[EvalResult(**given)])
    assert "| Perplexity | D | inf |" in content(adapter)
    assert "Infinity" not in content(adapter), "the record is JSON, which has no such number"
    assert "model-index" not in ModelCard.load(adapter / "README.md").data.to_dict()


def test_a_base_with_a_name_longer_than_a_path_may_be(adapter: Path) -> None:
    write_card(adapter, base_model="x" * 300)
    assert "base_model" not in ModelCard.load(adapter / "README.md").data.to_dict()


def test_an_earlier_evaluation_is_told_with_its_step_and_is_no_result(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.state.log_history.insert(3, {"eval_loss": 0.75, "eval_runtime": 1.0, "step": 4})  # of 6
    trainer.save_model()
    trainer.create_model_card()
    assert "| Loss | eval, after step 4 | 0.75 |" in content(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None
    value = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    assert "after step" not in content(tmp_path)
    assert [r.metric_value for r in ModelCard.load(tmp_path / "README.md").data.eval_results] == [value]


def test_of_the_best_model_its_own_evaluation_counts(tmp_path: Path) -> None:
    from hf_lora.train.card import final_scores

    trainer = make_trainer(tmp_path)
    trainer.args.load_best_model_at_end = True
    log = [{"eval_loss": loss, "eval_runtime": 1.0, "step": step} for step, loss in ((2, 0.5), (4, 0.25), (6, 0.75))]
    trainer.state.log_history = [*log, {"train_runtime": 9.0, "train_loss": 1.0, "step": 6}]
    trainer.state.global_step, trainer.state.best_global_step = 6, 4
    assert [score.value for score in final_scores(trainer)] == [0.25]
    trainer.args.load_best_model_at_end = False
    assert [score.value for score in final_scores(trainer)] == [0.75]


# Who writes it -------------------------------------------------------------------------------------------------------


def test_written_again_it_has_the_same_bytes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset="some rows", tags="mine")
    before = {f: (tmp_path / f).read_bytes() for f in ("README.md", "training_loss.png")}
    trainer.create_model_card()
    assert {f: (tmp_path / f).read_bytes() for f in before} == before
    write_card(tmp_path)  # without the run, which the file remembers
    assert {f: (tmp_path / f).read_bytes() for f in before} == before
    assert "Learning rate" in content(tmp_path)
    randomize(trainer.model, 3)
    trainer.save_model()
    write_card(tmp_path)  # other weights, of which nothing is known
    assert not {"Learning rate", "Steps"} & table(content(tmp_path)).keys()
    assert "training_loss.png" not in content(tmp_path)
    assert "mine" in ModelCard.load(tmp_path / "README.md").data.tags


def test_before_the_first_save_the_card_is_of_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()
    assert table(content(tmp_path))["Rank r"] == "8"
    assert "File size" not in table(content(tmp_path))


def test_pushes_bring_the_card_and_the_picture(tmp_path: Path) -> None:
    from hf_lora.testing import LocalHub

    with LocalHub() as hub, hub.active(tmp_path / "home"):
        trainer = make_trainer(
            tmp_path / "run", push_to_hub=True, hub_model_id="user/bert-three", hub_token=hub.token,
            hub_strategy="every_save", save_strategy="steps", save_steps=3, hub_always_push=True,
        )  # fmt: skip
        trainer.train()
        while_training = hub.files("user/bert-three")
        trainer.push_to_hub(license="mit")
        files = hub.files("user/bert-three")
    rows = table(while_training["README.md"].decode())
    assert rows["Steps"] == "6"
    assert rows["File size"] == f"{len(while_training['adapter_model.safetensors']):,} bytes"
    text = files["README.md"].decode()
    assert 'LoraModel.from_pretrained("user/bert-three"' in text
    assert "# bert-three\n" in text
    assert ModelCard(text).data.license == "mit"
    assert hub.token not in text
    assert files["training_loss.png"].startswith(b"\x89PNG")


def test_the_command_pushes_the_card_that_it_writes(bert_base: Path, tmp_path: Path) -> None:
    """With the results, and in the same commit as the adapter."""
    from hf_lora.testing import LocalHub
    from hf_lora.train.run import finetune

    lines = [f"{'open' if i % 2 else 'close'} the door,{'yes' if i % 2 else 'no'}" for i in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    given = {
        "model": str(bert_base),
        "train_file": str(tmp_path / "rows.csv"),
        "test_file": str(tmp_path / "rows.csv"),
    }
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        result = finetune(
            given | {
                "output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "disable_tqdm": True,
                "push_to_hub": True, "hub_model_id": "user/doors", "hub_token": hub.token,
            }
        )  # fmt: skip
        files = hub.files("user/doors")
        assert "End of training" in [commit.title for commit in hub.commits("user/doors")]
    local = {name: (tmp_path / "run" / name).read_bytes() for name in ("README.md", "adapter_model.safetensors")}
    for name in local:
        found, expected = (data.partition(b"<!-- hf_lora:end")[0] for data in (files[name], local[name]))
        assert found == expected, name
    (score, *_) = ModelCard(files["README.md"].decode()).data.eval_results
    assert score.dataset_name == "rows.csv"
    assert any(score.metric_value == pytest.approx(value, abs=1e-3) for value in result.metrics.values())
    assert 'LoraModel.from_pretrained("user/doors"' in files["README.md"].decode()


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.is_world_process_zero = lambda: False
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_a_readme_that_cannot_be_kept_does_not_stop_a_training(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path)
    (tmp_path / "README.md").write_text("---\na: [\n---\ntext", encoding="utf-8")
    trainer.is_in_train = True
    trainer.create_model_card()
    trainer.is_in_train = False
    with pytest.raises(AdapterFileError, match="not valid YAML"):
        trainer.create_model_card()
    assert content(tmp_path) == "---\na: [\n---\ntext"


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        write_card(tmp_path)
    assert not list(tmp_path.iterdir())


# The picture ---------------------------------------------------------------------------------------------------------

HISTORY = [
    {"loss": 2.0, "step": 10}, {"loss": 1.5, "step": 20}, {"eval_loss": 1.75, "eval_runtime": 1.0, "step": 20},
    {"loss": float("nan"), "step": 30}, {"loss": 1.0, "step": 40},
    {"eval_loss": 1.25, "eval_runtime": 1.0, "step": 40},
    {"train_runtime": 3.0, "train_loss": 1.5, "step": 40}, {"eval_loss": 9.0, "eval_runtime": 1.0, "step": 40},
]  # fmt: skip


def test_the_curve_has_the_points_of_the_log() -> None:
    from hf_lora.hub.card.curve import draw_curve, losses_of

    assert losses_of(HISTORY) == {
        "train": [(10, 2.0), (20, 1.5), (40, 1.0)], "eval": [(20, 1.75), (40, 1.25)],
    }  # fmt: skip
    assert draw_curve(HISTORY, "nats") == draw_curve(HISTORY, "nats") != draw_curve(HISTORY[:3], "nats")
    assert draw_curve(HISTORY[:1]) is None
    assert draw_curve([]) is None


def test_the_picture_is_light_and_fine(adapter: Path) -> None:
    import matplotlib
    from PIL import Image

    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.facecolor": "black"}):
        write_card(adapter, history=HISTORY)
    with Image.open(adapter / "training_loss.png") as picture:
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert all(110 <= dpi <= 150 for dpi in picture.info["dpi"])
        assert picture.width > 800
    assert "![Loss by step](training_loss.png)" in content(adapter)


def test_without_matplotlib_there_is_no_picture_and_no_error(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_card(adapter, history=HISTORY)
    assert not (adapter / "training_loss.png").exists()
    assert "training_loss" not in content(adapter)
