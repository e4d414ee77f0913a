"""Faults of a run: it is killed, terminated, its disk is full, its files are damaged, its numbers are not finite."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from tiny import adapter_values, sentences, tiny_bert
from transformers.trainer_utils import rotate_checkpoints as theirs

import hf_lora.train.checkpoint.store as store
from hf_lora import LoraConfig, LoraTrainer
from hf_lora.errors import AdapterFileError, ConfigError, TrainingError
from hf_lora.train.checkpoint.manifest import (
    ASIDE,
    MANIFEST_NAME,
    begin_checkpoint,
    finish_checkpoint,
    last_checkpoint,
    read_manifest,
    require_complete,
    rotate_checkpoints,
    why_incomplete,
)
from hf_lora.train.watch.finite import FiniteWatch

Make = Callable[..., Any]
CONFIG = LoraConfig(r=4, lora_dropout=0.3)
HERE = Path(__file__).parent


def trainer_of(args: Any, cls: Any = LoraTrainer, **more: Any) -> Any:
    values = {"train_dataset": sentences(), "eval_dataset": sentences(seed=5), "lora_config": CONFIG} | more
    return cls(tiny_bert(), args, **values)


# Killed and terminated -----------------------------------------------------------------------------------------------


def killed_runs(home: Path, *tasks: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_worker.py"), str(home), *tasks],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for runs in found:
        for run in runs["killed"]:
            assert run["different"] == [], run
            assert run["step"] - 4 <= run["resumed"] <= run["step"], run  # no finished checkpoint was lost
        if "terminated" in runs:
            assert runs["terminated"]["resumed"]
            assert runs["terminated"]["different"] == []
            assert all(steps == [3] for steps in runs["skipped"])
    return found


@pytest.mark.distributed
def test_killed_terminated_and_resumed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """Weights, optimizer, schedule and random numbers; dropout, shuffled data, shared inputs, loss over the head."""
    killed_runs(tmp_path, "1:2:12:3:", "2:0:16:3:t")


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_ten_moments(tmp_path: Path) -> None:
    found = killed_runs(tmp_path, "1:10:40:10:t", "2:10:40:20:t")
    for runs in found:
        assert len(runs["killed"]) == 10
        assert sum(run["kind"] != "training_step" for run in runs["killed"]) >= 5  # inside a save


# Damaged files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the checkpoints 2, 4 and 6, where the one of step 4 is the best."""
    from hf_lora import LoraTrainingArguments

    losses = iter([3.0, 1.0, 2.0])

    class Scored(LoraTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": next(losses)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    folder = tmp_path_factory.mktemp("trained")
    args = LoraTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=6, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, logging_strategy="no", load_best_model_at_end=True,
    )  # fmt: skip
    trainer_of(args, Scored).train()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.name == MANIFEST_NAME:  # the name of a tensor: still JSON, of the same length
        place = content.index(b"lora_A")
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_every_file_of_a_checkpoint_is_watched(folder: Path, damage: Callable[[Path], None]) -> None:
    newest = folder / "checkpoint-6"
    names = sorted(p.name for p in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"} < {
        *names
    }
    for name in names:
        if damage is Path.unlink and name == MANIFEST_NAME:
            continue  # then it is as an unmodified Trainer writes it
        whole = (newest / name).read_bytes()
        damage(newest / name)
        with pytest.raises(AdapterFileError, match=r"not a complete checkpoint(.|\n)*checkpoint-4 instead") as caught:
            require_complete(newest, contents=True)
        assert name in str(caught.value)
        assert last_checkpoint(folder) == str(folder / "checkpoint-4")
        (newest / name).write_bytes(whole)
    assert last_checkpoint(folder) == str(newest)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_without_a_manifest_the_checksums_of_the_archive_count(folder: Path, name: str) -> None:
    for step in (4, 6):
        (folder / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")
    path = folder / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    content[content.index(b"PK", 10) - 70] ^= 1  # in the data of the archive's first member
    path.write_bytes(content)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_resuming_without_the_optimizer_that_the_manifest_lists(folder: Path, arguments: Make) -> None:
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(AdapterFileError, match=r"optimizer\.pt is missing\n.*checkpoint-4 instead"):
        trainer_of(arguments(max_steps=8)).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_manifest_with_sizes_alone_is_still_read(folder: Path) -> None:
    path = folder / "checkpoint-6" / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["seal"]
    content |= {"format": 1, "files": {name: entry["size"] for name, entry in content["files"].items()}}
    path.write_text(json.dumps(content))
    assert why_incomplete(path.parent, contents=True) == []
    cut(path.parent / "optimizer.pt")
    assert "optimizer.pt has" in why_incomplete(path.parent)[0]


def test_a_damaged_best_checkpoint_is_not_loaded(folder: Path, arguments: Make, messages: list[str]) -> None:
    """At the end it is an error; where a run resumes it is forgotten, and another one becomes the best."""
    trainer = trainer_of(arguments(max_steps=6))
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-4")
    trainer._load_best_model()
    before = adapter_values(trainer.model)
    flip(folder / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"checkpoint-4, is damaged:\n(.|\n)*checkpoint-6.*checkpoint-2"):
        trainer._load_best_model()
    assert_same_tensors(adapter_values(trainer.model), before)

    args = arguments(
        output_dir=str(folder), max_steps=8, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    resumed = trainer_of(args)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(folder / "checkpoint-8")
    assert any("checkpoint-4, the best checkpoint so far" in m for m in messages)


# Which checkpoints stay ----------------------------------------------------------------------------------------------


def made(folder: Path, step: int, time: float | None = None, complete: bool = True) -> Path:
    """A checkpoint's folder, written at a given time."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
        (path / name).write_text("{}")
    finish_checkpoint(path, step)
    if not complete:
        (path / "adapter_model.safetensors").unlink()
    for inner in (*path.iterdir(), path):
        os.utime(inner, (time or step, time or step))
    return path


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("seed", range(6))
def test_among_complete_checkpoints_those_stay_that_trainer_keeps(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, limit = 5, 1 + seed % 4
    times = (torch.randperm(count, generator=generator) * 10 + 10).tolist()
    best = int(torch.randint(0, count + 1, (), generator=generator))
    for name in ("ours", "theirs"):
        paths = [made(tmp_path / name, 10 * (i + 1), times[i]) for i in range(count)]
        chosen = str(paths[best]) if best < count else None
        if name == "ours":
            rotate_checkpoints(tmp_path / name, limit, chosen)
        else:
            theirs(str(tmp_path / name), limit, chosen, use_mtime=True)
    assert left(tmp_path / "ours") == left(tmp_path / "theirs")


def test_incomplete_checkpoints_keep_no_place(tmp_path: Path) -> None:
    for step, complete in ((2, False), (4, True), (6, False), (8, True), (10, False), (12, False)):
        made(tmp_path, step, complete=complete)
    rotate_checkpoints(tmp_path, 2)
    assert left(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    rotate_checkpoints(tmp_path, 1)
    assert left(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
    (tmp_path / "checkpoint-8" / MANIFEST_NAME).unlink()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    rotate_checkpoints(tmp_path, 1)
    assert len(left(tmp_path)) == 3  # without a complete one nothing is deleted


def test_the_newest_and_the_best_stay_where_the_clock_says_otherwise(tmp_path: Path) -> None:
    """A file system without times, and an incomplete folder with a higher step."""
    for step in (2, 4, 6, 8):
        made(tmp_path, step, time=100.0, complete=step != 8)
    rotate_checkpoints(tmp_path, 1, tmp_path / "checkpoint-2", newest=tmp_path / "checkpoint-4")
    assert {"checkpoint-2", "checkpoint-4"} <= set(left(tmp_path))
    assert "checkpoint-6" not in left(tmp_path)


def test_a_complete_checkpoint_goes_only_when_its_successor_is_complete(tmp_path: Path) -> None:
    path = made(tmp_path, 4)
    begin_checkpoint(path)
    assert last_checkpoint(tmp_path) == f"{path}{ASIDE}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_text("half")
    assert last_checkpoint(tmp_path) == f"{path}{ASIDE}"
    begin_checkpoint(path)  # begun again after a kill
    assert last_checkpoint(tmp_path) == f"{path}{ASIDE}"
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
        (path / name).write_text("{ }")
    finish_checkpoint(path, 4)
    assert left(tmp_path) == [path.name]
    assert last_checkpoint(tmp_path) == str(path)


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(small_disk: Path, arguments: Make) -> None:
    args = arguments(output_dir=str(small_disk / "run"), max_steps=20, save_strategy="steps", save_steps=2)
    with pytest.raises(AdapterFileError, match="no space is left") as caught:
        trainer_of(args).train()
    names = sorted(int(p.name.partition("-")[2]) for p in (small_disk / "run").glob("checkpoint-*"))
    assert names
    assert f"Saving {small_disk / 'run' / f'checkpoint-{names[-1] + 2}'}: it could not be written" in str(caught.value)
    assert f"{small_disk / 'run' / f'checkpoint-{names[-1]}'} is complete and intact" in str(caught.value)
    assert all(why_incomplete(small_disk / "run" / f"checkpoint-{step}", contents=True) == [] for step in names)
    args.save_total_limit = 1  # as the message says; the newest one is then the only one while the next is written
    for step in names[:-1]:
        shutil.rmtree(small_disk / "run" / f"checkpoint-{step}")
    trainer_of(args).train(resume_from_checkpoint=True)
    assert left(small_disk / "run") == ["checkpoint-20"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_whatever_file_does_not_fit(folder: Path, arguments: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Written again over a complete checkpoint, which comes back. The files are limited as a quota does it."""
    resource = pytest.importorskip("resource")
    args = arguments(output_dir=str(folder), max_steps=4, save_strategy="steps", save_steps=2)
    trainer = trainer_of(args)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    entry = read_manifest(folder / "checkpoint-2")["files"][name]["size"]  # type: ignore[index]

    def limited(own: Any) -> Any:
        def call(*call_args: Any, **kwargs: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (entry // 2, limits[1]))
            try:
                return own(*call_args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return call

    if name == "trainer_state.json":
        monkeypatch.setattr(store, "finish_checkpoint", limited(store.finish_checkpoint))
    elif name == "adapter_model.safetensors":
        monkeypatch.setattr(trainer, "save_model", limited(trainer.save_model))
    else:
        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", limited(trainer._save_optimizer_and_scheduler))
    before = {p.name: p.read_bytes() for p in (folder / "checkpoint-2").iterdir()}
    with pytest.raises(AdapterFileError, match=r"checkpoint-2: it could not be written(.|\n)*is complete and intact"):
        trainer.train()
    assert {p.name: p.read_bytes() for p in (folder / "checkpoint-2").iterdir()} == before
    assert left(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


# Numbers that are not finite -----------------------------------------------------------------------------------------

SPOILT = 11
LAYER = "bert.encoder.layer.0.attention.self.query"


def spoilt(args: Any, value: float = float("nan"), steps: tuple[int, ...] = (SPOILT,), cls: Any = LoraTrainer) -> Any:
    """A trainer in which the gradient of one factor has a value that is not finite in some steps."""
    trainer = trainer_of(args, cls)
    factor = trainer.model.get_submodule(LAYER).lora_B["default"].weight

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if trainer.state.global_step + 1 in steps:
            gradient[0, 0] = value
        return gradient

    factor.register_hook(spoil)
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_with_the_step_and_the_tensor(arguments: Make, value: float) -> None:
    args = arguments(max_steps=20, logging_strategy="steps", logging_steps=4, save_strategy="steps", save_steps=5)
    trainer = spoilt(args, value)
    with pytest.raises(TrainingError, match=rf"Step {SPOILT}: the gradients of 1 of \d+ tensors") as caught:
        trainer.train()
    assert f"({LAYER}.lora_B.default.weight)" in str(caught.value)
    assert "nonfinite" in str(caught.value)
    assert trainer.state.global_step == 10
    assert all(torch.isfinite(v).all() for v in adapter_values(trainer.model).values())
    assert last_checkpoint(args.output_dir) == str(Path(args.output_dir) / "checkpoint-10")
    resumed = trainer_of(args)
    resumed._load_from_checkpoint(str(Path(args.output_dir) / "checkpoint-10"))
    assert_same_tensors(adapter_values(trainer.model), adapter_values(resumed.model))  # those of step 10


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, {"optim": "sgd"}])
def test_a_skipped_step_is_as_if_it_were_not_made(
    arguments: Make, messages: list[str], settings: dict[str, Any]
) -> None:
    """Against a run with good numbers whose optimizer does nothing at that step."""
    common = {"max_steps": 20, "weight_decay": 0.1, "lr_scheduler_type": "cosine", **settings}
    reference = trainer_of(arguments(**common))
    plain = reference.create_optimizer
    made_steps = []

    def with_a_gap(*args: Any) -> Any:
        optimizer = plain(*args)
        own = optimizer.step

        def step(*step_args: Any, **kwargs: Any) -> Any:
            made_steps.append(reference.state.global_step + 1)
            return None if made_steps[-1] == SPOILT else own(*step_args, **kwargs)

        optimizer.step = step
        return optimizer

    reference.create_optimizer = with_a_gap
    reference.train()
    assert made_steps == list(range(1, 21))
    trainer = spoilt(arguments(**common, nonfinite="skip"))
    trainer.train()
    assert trainer.state.global_step == 20
    assert trainer.finite.skipped == [SPOILT]
    assert_same_tensors(adapter_values(trainer.model), adapter_values(reference.model))
    assert any(f"Step {SPOILT}:" in m and LAYER in m for m in messages)
    assert any(
        f"1 of 20 steps were skipped because their loss or gradients were not finite: {SPOILT}." in m for m in messages
    )


def test_a_loss_that_is_not_finite_is_named(arguments: Make) -> None:
    """Also where its gradients are: one label that the model holds for impossible has an infinite loss."""

    class Infinite(LoraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + (float("inf") if self.state.global_step == 2 else 0.0)

    trainer = trainer_of(arguments(max_steps=6), Infinite)
    with pytest.raises(TrainingError, match="Step 3: the loss is not finite"):
        trainer.train()


def test_too_many_skipped_steps_in_a_row_stop_the_run(arguments: Make) -> None:
    trainer = spoilt(arguments(max_steps=40, nonfinite="skip"), steps=(3, *range(6, 40)))
    with pytest.raises(TrainingError, match=r"The last \d+ steps were all skipped"):
        trainer.train()
    assert trainer.finite.skipped[:2] == [3, 6]
    assert trainer.state.global_step == 14


def test_what_to_do_is_one_of_two(arguments: Make) -> None:
    with pytest.raises(ConfigError, match="nonfinite='never'"):
        arguments(nonfinite="never")
    with pytest.raises(ConfigError, match="stop, skip"):
        FiniteWatch("never")


def test_a_merged_model_with_an_overflow_is_not_written(tmp_path: Path) -> None:
    from helpers import randomize, tiny_llama

    from hf_lora import MergeError, apply_lora
    from hf_lora.export import merge_to_folder

    base = tiny_llama()
    randomize(apply_lora(base, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(tmp_path / "adapter")
    large = tiny_llama()
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6  # float32 holds it, float16 does not
    for allowed in (False, True):
        args: dict[str, Any] = {"base_model": large, "dtype": "float16", "allow_other_base": True}
        if not allowed:
            with pytest.raises(
                MergeError, match=r"1 weights hold NaN or infinity, such as model\.layers\.0\.mlp\.up_proj"
            ):
                merge_to_folder(tmp_path / "adapter", tmp_path / "merged", **args)
            assert not (tmp_path / "merged").exists()
        else:
            large = tiny_llama()
            with torch.no_grad():
                large.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
            args["base_model"] = large
            merge_to_folder(tmp_path / "adapter", tmp_path / "merged", allow_nonfinite=True, **args)
            assert (tmp_path / "merged" / "model.safetensors").is_file()
