"""Every private name of transformers and Accelerate that hf_lora touches, in one place.

Seen in transformers 5.17 and 5.23 with accelerate 1.15. A test compares this table with what is installed, so that a
release that renames one of them fails there and not in somebody's training run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
}
"""Private methods of `transformers.Trainer` that `LoraTrainerMixin` overrides -> their parameters after self.

Public methods that it overrides (`create_accelerator_and_postprocess`, `call_model_init`, `create_optimizer`,
`compute_loss`, `floating_point_ops`, `save_model`, `train`) need no entry.
"""

CALLED: dict[str, tuple[str, ...]] = {
    "_build_accelerator_args": ("kwargs",),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
}
"""Private methods of `transformers.Trainer` that are called or looked for -> their parameters after self."""


@contextlib.contextmanager
def held_load_report() -> Iterator[Callable[[], None]]:
    """Keep back the table of missing keys that `from_pretrained` logs; calling what is yielded logs it after all.

    The record comes from the logger of `transformers.modeling_utils` and has "LOAD REPORT" in its text.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    def release() -> None:
        logger.removeFilter(hold)
        while held:
            logger.handle(held.pop(0))

    logger.addFilter(hold)
    try:
        yield release
    finally:
        logger.removeFilter(hold)


def shifts_labels(trainer: Any) -> bool:
    """Whether the model's own loss compares position t with label t + 1.

    Trainer knows it in two ways, each with gaps: by the model's loss (`Trainer._loss_shifts_labels`, since 5.17),
    which misses classes whose name says nothing of it, and by the class's place among the causal language models.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = trainer.model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return causal or bool(getattr(trainer, "_loss_shifts_labels", False))


def scales_loss(optimizer: Any) -> bool:
    """Whether gradients come from a scaled loss (fp16), where an overflow now and then is normal.

    `AcceleratedOptimizer.scaler` is None or absent without scaling.
    """
    return getattr(optimizer, "scaler", None) is not None


def push_is_running(trainer: Any) -> bool:
    """Whether Trainer is still uploading the last checkpoint (`Trainer.push_in_progress`, futures or None)."""
    push = getattr(trainer, "push_in_progress", None)
    return push is not None and not push.is_done()
