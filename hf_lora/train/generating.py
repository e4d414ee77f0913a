"""Completions of GRPO and RLOO from a merged adapter: faster, with a copy of the adapted weights in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapt.inner import adapted_part
from ..adapt.merge import check_mergeable, folds_of, merge, unmerge
from ..adapt.state import require_state
from ..errors import ConfigError, Faults


def check_generation(trainer: Any) -> None:
    """Refuse `lora_generate_merged` where the adapter cannot be merged, or where completions come from elsewhere.

    Raises:
        ConfigError, MergeError: list every reason.
    """
    call, args = f"{type(trainer).__name__}(…, lora_generate_merged=True)", trainer.args
    model, faults = adapted_part(trainer._bare_model), Faults(call)
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name, False):
            faults.add(f"{name}=True generates in another way")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        faults.add("this engine shards the weights, which cannot be merged in place")
    faults.check(ConfigError, "Omit lora_generate_merged.")
    active = require_state(model, call).activity.active
    check_mergeable(model, folds_of(model, active), active, untie=False, keep=True, call=call)


@contextlib.contextmanager
def merged_within(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters within; afterwards, also after an error or an interruption, every bit is restored."""
    try:
        merge(model, call="generate")
        yield
    finally:
        if require_state(model, "generate").activity.merged:
            unmerge(model)
