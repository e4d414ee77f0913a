"""LoRA fine-tuning for Hugging Face models: one import changes in a training script.

    from hf_lora import LoraTrainer as Trainer, LoraTrainingArguments as TrainingArguments

Public names are imported when they are first used, so `import hf_lora` costs nothing by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "LoraConfig": "config",
    "LoraModel": "model",
    "apply_lora": "apply",
    "get_peft_model": "apply",
    "pipeline": "pipelines",
    "write_card": "hub.card.write",
    "push": "hub.upload",
    "pull": "hub.download",
    "load_for_generation": "generate.loading",
    "generate_texts": "generate.texts",
    "generate_answers": "generate.texts",
    "Conversation": "generate.conversation",
    "explain_targets": "adapt.targets",
    "INITS": "layers.inits",
    "METHODS": "layers.methods",
    "SHAPES": "layers.shapes",
    "PARTS": "layers.parts",
    "STORAGES": "layers.storages",
    "register": "layers.registry",
    "check_adapter": "adapt.check",
    "share_inputs": "adapt.sharing",
    "gathered_state": "adapt.gather",
    "merge_files": "file_merge.stream",
    "merge_to_folder": "export",
    "inspect_adapter": "export",
    "convert_adapter": "files.convert",
    "finetune": "train.run",
    "recommend": "train.advice",
    "build_classifier": "pooled.build",
    "Pooling": "pooled.pooling",
    "start_head": "pooled.head_start",
    "save_as_sentence_transformer": "pooled.export",
    "LoraTrainer": "train.trainer",
    "LoraSeq2SeqTrainer": "train.trainer",
    "LoraTrainerMixin": "train.trainer",
    "LoraSFTTrainer": "train.sft",
    "LoraSFTConfig": "train.sft",
    "LoraDPOConfig": "train.preference",
    "LoraDPOTrainer": "train.preference",
    "LoraKTOConfig": "train.preference",
    "LoraKTOTrainer": "train.preference",
    "LoraRewardConfig": "train.preference",
    "LoraRewardTrainer": "train.preference",
    "LoraGRPOConfig": "train.preference",
    "LoraGRPOTrainer": "train.preference",
    "LoraRLOOConfig": "train.preference",
    "LoraRLOOTrainer": "train.preference",
    "LoraCrossEncoderTrainer": "train.embedding",
    "LoraCrossEncoderTrainingArguments": "train.embedding",
    "LoraSentenceTransformerTrainer": "train.embedding",
    "LoraSentenceTransformerTrainingArguments": "train.embedding",
    "LoraTrainingArguments": "train.arguments",
    "LoraSeq2SeqTrainingArguments": "train.arguments",
    "evaluate": "tasks.run",
    "build_compute_metrics": "evaluation.metrics",
    "register_adapter_hooks": "train.checkpoint.state_hooks",
    "LoraError": "errors",
    "ConfigError": "errors",
    "TargetError": "errors",
    "StateError": "errors",
    "MergeError": "errors",
    "AdapterFileError": "errors",
    "BaseMismatchError": "errors",
    "HubError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "VersionError": "errors",
}
_LIGHT = ("config", "errors")
"""Modules that need no other library."""
_IN_PEFT = {
    "TaskType": 'the name as a text: LoraConfig(task_type="SEQ_CLS")',
    "PeftConfig": "LoraConfig",
    "PeftModel": "LoraModel",
    "prepare_model_for_kbit_training": "apply_lora alone, which does what a quantized base needs",
    "inject_adapter_in_model": "apply_lora",
    "get_peft_model_state_dict": "model.get_adapter_state_dict()",
    "set_peft_model_state_dict": "model.load_state_dict(values)",
    "get_peft_config": "LoraConfig.from_any(…)",
    "create_loraplus_optimizer": "LoraTrainingArguments(loraplus_lr_ratio=…)",
    "create_lorafa_optimizer": 'LoraConfig(method="lora_fa")',
    "initialize_lora_eva_weights": 'LoraConfig(init_lora_weights="eva")',
    "preprocess_corda": 'LoraConfig(init_lora_weights="corda")',
    "preprocess_loraga": 'LoraConfig(init_lora_weights="lora_ga")',
    "hotswap_adapter": "model.load_adapter_weights(folder, name)",
}
"""Name in PEFT -> what takes its place here."""

_INSTALLED_BY = {"trl": '"hf_lora[chat]"', "sentence_transformers": "sentence-transformers"}
"""Module that only some names need -> what pip installs it with."""

__all__ = [
    "INITS",
    "METHODS",
    "PARTS",
    "SHAPES",
    "STORAGES",
    "AdapterFileError",
    "BaseMismatchError",
    "ConfigError",
    "Conversation",
    "DataError",
    "HubError",
    "LoraConfig",
    "LoraCrossEncoderTrainer",
    "LoraCrossEncoderTrainingArguments",
    "LoraDPOConfig",
    "LoraDPOTrainer",
    "LoraError",
    "LoraGRPOConfig",
    "LoraGRPOTrainer",
    "LoraKTOConfig",
    "LoraKTOTrainer",
    "LoraModel",
    "LoraRLOOConfig",
    "LoraRLOOTrainer",
    "LoraRewardConfig",
    "LoraRewardTrainer",
    "LoraSFTConfig",
    "LoraSFTTrainer",
    "LoraSentenceTransformerTrainer",
    "LoraSentenceTransformerTrainingArguments",
    "LoraSeq2SeqTrainer",
    "LoraSeq2SeqTrainingArguments",
    "LoraTrainer",
    "LoraTrainerMixin",
    "LoraTrainingArguments",
    "MergeError",
    "Pooling",
    "StateError",
    "TargetError",
    "TrainingError",
    "VersionError",
    "__version__",
    "apply_lora",
    "build_classifier",
    "build_compute_metrics",
    "check_adapter",
    "convert_adapter",
    "evaluate",
    "explain_targets",
    "finetune",
    "gathered_state",
    "generate_answers",
    "generate_texts",
    "get_peft_model",
    "inspect_adapter",
    "load_for_generation",
    "merge_files",
    "merge_to_folder",
    "pipeline",
    "pull",
    "push",
    "recommend",
    "register",
    "register_adapter_hooks",
    "save_as_sentence_transformer",
    "share_inputs",
    "start_head",
    "write_card",
]

if TYPE_CHECKING:
    from .adapt.check import check_adapter
    from .adapt.gather import gathered_state
    from .adapt.sharing import share_inputs
    from .adapt.targets import explain_targets
    from .apply import apply_lora, get_peft_model
    from .config import LoraConfig
    from .errors import (
        AdapterFileError,
        BaseMismatchError,
        ConfigError,
        DataError,
        HubError,
        LoraError,
        MergeError,
        StateError,
        TargetError,
        TrainingError,
        VersionError,
    )
    from .evaluation.metrics import build_compute_metrics
    from .export import inspect_adapter, merge_to_folder
    from .file_merge.stream import merge_files
    from .files.convert import convert_adapter
    from .generate.conversation import Conversation
    from .generate.loading import load_for_generation
    from .generate.texts import generate_answers, generate_texts
    from .hub.card.write import write_card
    from .hub.download import pull
    from .hub.upload import push
    from .layers.inits import INITS
    from .layers.methods import METHODS
    from .layers.parts import PARTS
    from .layers.registry import register
    from .layers.shapes import SHAPES
    from .layers.storages import STORAGES
    from .model import LoraModel
    from .pipelines import pipeline
    from .pooled.build import build_classifier
    from .pooled.export import save_as_sentence_transformer
    from .pooled.head_start import start_head
    from .pooled.pooling import Pooling
    from .tasks.run import evaluate
    from .train.advice import recommend
    from .train.arguments import LoraSeq2SeqTrainingArguments, LoraTrainingArguments
    from .train.checkpoint.state_hooks import register_adapter_hooks
    from .train.embedding import (
        LoraCrossEncoderTrainer,
        LoraCrossEncoderTrainingArguments,
        LoraSentenceTransformerTrainer,
        LoraSentenceTransformerTrainingArguments,
    )
    from .train.preference import (
        LoraDPOConfig,
        LoraDPOTrainer,
        LoraGRPOConfig,
        LoraGRPOTrainer,
        LoraKTOConfig,
        LoraKTOTrainer,
        LoraRewardConfig,
        LoraRewardTrainer,
        LoraRLOOConfig,
        LoraRLOOTrainer,
    )
    from .train.run import finetune
    from .train.sft import LoraSFTConfig, LoraSFTTrainer
    from .train.trainer import LoraSeq2SeqTrainer, LoraTrainer, LoraTrainerMixin


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        if instead := _instead_of(name):  # `from hf_lora import …` replaces the text of an AttributeError
            raise ImportError(f"hf_lora has no {name}, which is PEFT's. Use {instead}.", name=__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _WHERE[name] not in _LIGHT:
        from .versions import check_versions

        check_versions()
    try:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from .errors import VersionError

        missing = (error.name or "").partition(".")[0]
        if missing not in _INSTALLED_BY:
            raise
        raise VersionError(f"{name} needs {missing}. Run: pip install {_INSTALLED_BY[missing]}") from error
    globals()[name] = value
    return value


def _instead_of(name: str) -> str | None:
    """What takes the place of a name in PEFT."""
    if name.startswith("AutoPeftModel"):
        return 'LoraModel.from_pretrained("adapter"), which also loads the base'
    return _IN_PEFT.get("PeftModel" if name.startswith("PeftModelFor") else name)


def __dir__() -> list[str]:
    return __all__
