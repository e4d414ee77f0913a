"""The Trainer of a run of `finetune`, with its model and adapter: one builder for each library of trainers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import set_seed

from ..adapt.heads import find_heads, outside_backbone
from ..adapt.inner import adapted_part
from ..adapt.match import holder, matcher
from ..adapt.state import set_trained_format
from ..compat import held_load_report
from ..errors import ConfigError
from ..pooled.build import load_pooled
from ..pooled.head_start import start_head
from ..tasks.base import Data, Task
from ..tasks.embedding import is_scored
from ..tasks.preference import Preference
from ..tasks.registry import CAUSAL_LM, EMBEDDING, PREFERENCES
from .base_model import load_base
from .check import checkpoint_of
from .parsing import Parsed
from .quantize import bits_of, load_quantized


def build_trainer(parsed: Parsed, data: Data) -> Any:
    """The Trainer of a run, with the model and its adapter."""
    builders = {CAUSAL_LM: _language_model, EMBEDDING: _embedding, **dict.fromkeys(PREFERENCES, _preference)}
    trainer = builders.get(data.task.name, _model)(parsed, data)
    if data.trained is not None:
        set_trained_format(adapted_part(trainer._bare_model), data.trained)
    return trainer


def _model(parsed: Parsed, data: Data) -> Any:
    """The Trainer of every task but causal language modeling."""
    from .trainer import LoraTrainer

    training, task = parsed.training, data.task
    model = _with_head(parsed, data)
    training.label_names = list(task.targets)
    return LoraTrainer(model, training, task.collator(data), **_common(data))


def _with_head(parsed: Parsed, data: Data) -> Any:
    """The base model with a head for the task."""
    training, task = parsed.training, data.task
    # A head for another task is replaced.
    options = {**task.settings(data), "ignore_mismatched_sizes": True, "output_loading_info": True}
    with held_load_report() as release:
        model, found = _load(parsed, data, options)
        heads = find_heads(model)
        if any(holder(key, heads) is None for key in found["missing_keys"]):
            release()  # a new head is not missing; the adapter's line names it
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = getattr(data.processor, "pad_token_id", None)
    if training.lora_modules_to_save is None and (head := _whole(parsed, task, model)):
        training.lora_modules_to_save = head  # its labels may be others, although it has this number
    _start_head(parsed, data, model, list(heads))
    return model


def _start_head(parsed: Parsed, data: Data, model: Any, heads: list[str]) -> None:
    """Start a new head of a single-label classifier at its class means, unless an adapter or a checkpoint has it."""
    run, training, task = parsed.run, parsed.training, data.task
    known = training.lora_adapter is not None or checkpoint_of(parsed)
    if run.head_init == "random" or not task.starts_at_means or data.labels is None or known or not heads:
        return
    if not (getattr(model, "is_quantized", False) or training.fsdp or training.deepspeed):
        model.to(training.device)
    try:
        loss = start_head(
            model, data.rows["train"], collator=task.collator(data), batch_size=training.per_device_eval_batch_size,
            progress=not training.disable_tqdm and training.process_index == 0,
        )  # fmt: skip
    except ConfigError as error:
        if "head_init" in parsed.given:
            raise
        data.lines.append(f"the head starts at random: {error}")
        return
    chance = math.log(len(data.labels))
    data.lines.append(f"the head starts at the class means: loss {loss:.2f} before training (chance: {chance:.2f})")


def _language_model(parsed: Parsed, data: Data) -> Any:
    from .sft import LoraSFTConfig, LoraSFTTrainer

    run, training = parsed.run, parsed.training
    return LoraSFTTrainer(
        _load(parsed, data, {}),
        LoraSFTConfig.of(training, packing=run.packing, max_length=data.length),
        **_common(data),
    )


def _preference(parsed: Parsed, data: Data) -> Any:
    """TRL's Trainer of a task on preferences."""
    from . import preference

    run, training, task = parsed.run, parsed.training, data.task
    assert isinstance(task, Preference)
    model = _with_head(parsed, data) if task.has_head else _load(parsed, data, {})
    config, trainer = (getattr(preference, f"Lora{task.trainer}{kind}") for kind in ("Config", "Trainer"))
    more: dict[str, Any] = {"beta": run.beta} if run.beta is not None else {}
    order = config.__dataclass_fields__["train_sampling_strategy"].default
    if order == "sequential" and "train_sampling_strategy" not in parsed.given:  # KTO compares neighbors of a batch
        more["train_sampling_strategy"] = order
        data.rows["train"] = data.rows["train"].shuffle(seed=training.seed)
    return trainer(model, args=config.of(training, max_length=data.length, **more), **_common(data))


def _embedding(parsed: Parsed, data: Data) -> Any:
    """The Trainer of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from . import embedding

    run, training, rows = parsed.run, parsed.training, data.rows

    def load(more: dict[str, Any]) -> Any:
        set_seed(training.seed)
        kwargs = {**({"dtype": run.dtype} if run.dtype else {}), **more}
        place = {} if "device_map" in kwargs else {"device": str(training.device)}
        options = {"revision": run.model_revision, "model_kwargs": kwargs, **place}
        return load_base(SentenceTransformer, str(run.model), str(run.model), **options)

    model = _loaded(parsed, data, load)
    model.max_seq_length = min(data.length, model.max_seq_length or data.length)
    arguments = embedding.LoraSentenceTransformerTrainingArguments.of(training)
    if is_scored(rows["train"]):
        loss: nn.Module = losses.CoSENTLoss(model)  # which compares similarities of any scale
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
        arguments.batch_sampler = "no_duplicates"  # the other rows of a batch are the negatives
    return embedding.LoraSentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=rows["train"], eval_dataset=rows.get("eval", rows.get("test")),
        loss=loss,
    )  # fmt: skip


def _common(data: Data) -> dict[str, Any]:
    """Arguments that both Trainers take."""
    split = "eval" if "eval" in data.rows else "test"
    compute_metrics = data.task.compute_metrics(data, split) if split in data.rows else None
    return {"train_dataset": data.rows["train"], "eval_dataset": data.rows.get(split),
            "processing_class": data.processor, "compute_metrics": compute_metrics}  # fmt: skip


def _load(parsed: Parsed, data: Data, options: dict[str, Any]) -> Any:
    """The base model of a run, with the random weights of a new head by the seed."""
    run, name = parsed.run, str(parsed.run.model)
    own = {"revision": run.model_revision, **({"dtype": run.dtype} if run.dtype else {}), **options}

    def load(more: dict[str, Any]) -> Any:
        set_seed(parsed.training.seed)
        options = {**own, **more}
        if data.pooling is not None:
            return load_base(load_pooled, name, name, data.config, data.pooling, options)
        auto_class = getattr(transformers, data.task.auto_class)
        return load_base(auto_class.from_pretrained, name, name, **options)

    return _loaded(parsed, data, load)


def _loaded(parsed: Parsed, data: Data, load: Callable[[dict[str, Any]], Any]) -> Any:
    """The base model by `load`, which takes further options of `from_pretrained`: quantized, if the run says so."""
    run, whole = parsed.run, functools.partial(_whole, parsed, data.task)
    return load({}) if bits_of(run) is None else load_quantized(load, run, data.config, parsed.training.device, whole)


def _whole(parsed: Parsed, task: Task, model: nn.Module) -> list[str]:
    """The modules of a base that are trained whole: those that the user named, else a head that the checkpoint has."""
    named = parsed.training.lora_config().modules_to_save
    if named is not None:
        hits = matcher(named)
        return [name for name, _ in model.named_modules() if hits(name)]
    return outside_backbone(model) if task.has_head and not find_heads(model) else []
