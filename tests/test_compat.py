"""Every private name of another library that compat.py lists is there, and private names are used nowhere else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

import hf_lora
from hf_lora import LoraTrainerMixin, compat
from hf_lora.train.hub_methods import HubMethods

TRAIN = Path(hf_lora.__file__).parent / "train"


# Everywhere.

PACKAGE = Path(hf_lora.__file__).parent
OUR_OWN = {
    "_hf_lora", "_hf_lora_outer", "_hf_lora_state_around", "_hf_lora_progress", "_hf_lora_packs_for_cpu",
    "_hf_lora_causal", "_loss", "_runtime", "_C",
}  # fmt: skip
"""Attributes and keys that we set on others' objects, names of metrics, and torch's compiled module."""
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}
"""Public names of Python's named tuples."""
METHODS_OF_INITIALIZATION = ("adapt", "bypass.py")
"""Lists names of methods that models may have; a name that is gone does no harm."""


def private_names(file: Path) -> set[str]:
    """Private attributes, and texts that look like one, in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {
        name for name in found if name.isidentifier() and name[0] == "_" and not name.startswith("__") and name[1:]
    }


def defined_names(file: Path) -> set[str]:
    """What a file defines or sets."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def test_private_names_of_other_libraries_are_listed() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in ("testing", "compat.py")]
    ours = OUR_OWN.union(*(defined_names(f) for f in files)) - compat.ATTRIBUTES.keys()
    listed = {*compat.OVERRIDDEN, *compat.CALLED, *compat.ATTRIBUTES}
    used: set[str] = set()
    for file in files:
        if file.relative_to(PACKAGE).parts != METHODS_OF_INITIALIZATION:
            used |= private_names(file) | (defined_names(file) & compat.ATTRIBUTES.keys())
    assert used - ours - listed - OF_NAMED_TUPLES == set()
    assert compat.ATTRIBUTES.keys() - used == set(), "listed and not used"


@pytest.mark.parametrize("name", compat.ATTRIBUTES)
def test_private_attributes_are_where_they_were_seen(name: str) -> None:
    place = compat.ATTRIBUTES[name]
    if place.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    owner = pkgutil.resolve_name(place)
    assert hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner))


# Trainer.


@pytest.mark.parametrize("name", [*compat.OVERRIDDEN, *compat.CALLED])
def test_private_methods_of_trainer_have_the_parameters_they_had(name: str) -> None:
    expected = {**compat.OVERRIDDEN, **compat.CALLED}[name]
    assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == expected


def test_what_the_mixin_overrides_and_calls_is_listed() -> None:
    own = {*vars(LoraTrainerMixin), *vars(HubMethods)}
    assert {n for n in own if n[0] == "_" and n[:2] != "__" and hasattr(Trainer, n)} == set(compat.OVERRIDDEN)
    nodes = (
        n for file in ("trainer.py", "hub_methods.py") for n in ast.walk(ast.parse((TRAIN / file).read_text("utf-8")))
    )
    private = {n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr[0] == "_" != n.attr[1]}
    assert {n for n in private - own if hasattr(Trainer, n)} <= {*compat.OVERRIDDEN, *compat.CALLED}
    public = ("create_accelerator_and_postprocess", "call_model_init", "create_optimizer", "save_model", "train",
              "training_step", "compute_loss", "prediction_step", "floating_point_ops", "init_hf_repo", "push_to_hub",
              "create_model_card", "evaluation_loop")  # fmt: skip
    assert all(callable(getattr(Trainer, name)) for name in public)


@pytest.mark.parametrize("name", compat.OF_TRL)
def test_private_methods_of_trl_have_the_parameters_they_had(name: str) -> None:
    trainer = pytest.importorskip("trl").SFTTrainer
    assert tuple(inspect.signature(getattr(trainer, name)).parameters)[1:] == compat.OF_TRL[name]
    from hf_lora import LoraSFTTrainer

    assert {n for n in vars(LoraSFTTrainer) if n[0] == "_" and n[1] != "_" and hasattr(trainer, n)} == {*compat.OF_TRL}


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_private_methods_of_generation_are_where_they_were(kind: str) -> None:
    trainer = getattr(pytest.importorskip("trl"), f"{kind}Trainer")
    from hf_lora.train.preference import LoraReinforcementMixin as ours

    assert {n for n in vars(ours) if n[0] == "_" and n[1] != "_" and hasattr(trainer, n)} == {*compat.OF_GENERATION}
    assert "self._generate_single_turn(" in inspect.getsource(trainer)
    assert ".generate(" in inspect.getsource(trainer._generate_single_turn)


def test_attributes_of_trainer_that_are_looked_for_are_set() -> None:
    assert "_loss_shifts_labels" in inspect.getsource(Trainer.__init__)
    assert "_train_batch_size" in inspect.getsource(Trainer)
    assert "push_in_progress" in inspect.getsource(Trainer.init_hf_repo)
    saving = inspect.getsource(Trainer._save_checkpoint)
    order = ("save_to_json", "_push_from_checkpoint", "rotate_checkpoints")
    assert [saving.index(name) for name in order] == sorted(saving.index(name) for name in order)
    assert "_setup_devices" in vars(TrainingArguments)


def test_the_manifest_is_written_between_the_state_and_the_rest(tmp_path: Path) -> None:
    state, seen = TrainerState(), []
    with compat.after_state_is_written(state, lambda: seen.append((tmp_path / "state.json").is_file())):
        state.save_to_json(str(tmp_path / "state.json"))
    state.save_to_json(str(tmp_path / "again.json"))
    assert seen == [True]


def test_older_checkpoints_are_deleted_with_another_function() -> None:
    import transformers.trainer as module

    seen: list[Any] = []
    own = module.rotate_checkpoints
    with compat.rotates_with(lambda folder, **settings: seen.append((folder, settings))):
        module.rotate_checkpoints(output_dir="a", save_total_limit=2, best_model_checkpoint=None, use_mtime=True)
    assert seen == [("a", {"save_total_limit": 2, "best_model_checkpoint": None})]
    assert module.rotate_checkpoints is own


def test_pushes_in_the_background_are_waited_for() -> None:
    job = SimpleNamespace(done=lambda: False)
    trainer = SimpleNamespace(push_in_progress=None)
    assert not compat.push_is_running(trainer)
    compat.add_push(trainer, job)
    compat.add_push(trainer, job)
    assert compat.push_is_running(trainer)
    assert trainer.push_in_progress.jobs == [job, job]


def test_the_handler_of_sigterm_is_told_from_another() -> None:
    from transformers.trainer_jit_checkpoint import CheckpointManager

    manager, before = CheckpointManager(trainer=None), signal.getsignal(signal.SIGTERM)
    assert not compat.handles_sigterm(manager)
    try:
        manager.setup_signal_handler()
        assert compat.handles_sigterm(manager)
        assert manager.is_checkpoint_requested is False
    finally:
        signal.signal(signal.SIGTERM, before)


# The others.


def test_a_models_name_is_that_of_its_folder(tmp_path: Path) -> None:
    from tiny import tiny_bert

    tiny_bert().save_pretrained(tmp_path)
    assert compat.name_or_path(type(tiny_bert()).from_pretrained(tmp_path)) == str(tmp_path)


def test_accelerates_optimizer_shows_its_scaler() -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # without its state an optimizer cannot be made
    plain = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    for scaler in (None, object()):
        optimizer = AcceleratedOptimizer(plain, device_placement=False, scaler=scaler)  # type: ignore[arg-type]
        assert compat.scales_loss(optimizer) == (scaler is not None)
        assert optimizer.optimizer is plain
    assert compat.zero_partitions(plain) is None


def test_names_of_deepspeeds_optimizers() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    assert "fp32_partitioned_groups_flat" in inspect.getsource(stage3)
    assert "single_partition_of_fp32_groups" in inspect.getsource(stage_1_and_2)
    names = ("_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked")
    assert all(name in inspect.getsource(stage_1_and_2) for name in names)


def test_what_is_asked_of_trls_trainer() -> None:
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    fields = {f.name for f in dataclasses.fields(FusedCausalLMOutput)}
    assert fields >= {"loss", "log_probs", "entropy", "is_top1", "label_mask", "aux_loss"}
    assert "fused_lm_head=True" in inspect.getsource(SFTTrainer.compute_loss)
    assert "padding_free" in inspect.getsource(SFTTrainer.__init__)


def names_of_others(file: Path) -> set[str]:
    """Private attributes of anything but `self`, and private names that are imported from other packages."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" != node.attr[1]:
            of_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_own |= isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super"
            found |= set() if of_own else {node.attr}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return found


OWN = {"_lora", "_bare_model", "_dtypes", "_parameters"}
"""Of our own classes; and torch's `Module._parameters`, which has been there since its first release."""


@pytest.mark.parametrize("file", sorted(TRAIN.rglob("*.py")), ids=lambda f: str(f.relative_to(TRAIN)))
def test_training_uses_no_other_private_names(file: Path) -> None:
    assert names_of_others(file) - OWN - OF_NAMED_TUPLES <= {*compat.OVERRIDDEN, *compat.CALLED}
