"""Run by test_engines.py in each of two processes: ZeRO through LoraTrainer; results go into a folder."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from engine_runs import expect, fresh_model, run_arguments, write_result
from helpers import randomize
from processes import leave
from tiny import texts
from transformers import LlamaForCausalLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_lora import LoraConfig, LoraTrainer, apply_lora, gathered_state
from hf_lora.adapt.report import trainable_parameters
from hf_lora.errors import AdapterFileError, LoraError


def zero_config(stage: int = 3, bf16: bool = False) -> Any:
    return HfTrainerDeepSpeedConfig({
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": bf16},
    })  # fmt: skip


class ZeroTrainer(LoraTrainer):
    """Accelerate takes its DeepSpeed branch on accelerators only; here it is led into it."""

    stage = 3
    bf16 = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = DeepSpeedPlugin(hf_ds_config=zero_config(self.stage, self.bf16))
        plugin._selected = True
        PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.DEEPSPEED
        self.accelerator.state.deepspeed_plugins = {"default": plugin}
        self.accelerator.deepspeed_engine_wrapped = None
        self.is_deepspeed_enabled = True


class ZeroTwo(ZeroTrainer):
    stage = 2


class ZeroHalf(ZeroTrainer):
    bf16 = True


def run(cls: Any, folder: Path, resume: Path | None = None, model: Any = None, **values: Any) -> Any:
    trainer = cls(
        model or fresh_model(), run_arguments(folder, per_device_train_batch_size=2, **values), train_dataset=texts()
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    write_result(folder, gathered_state(trainer._bare_model))
    return trainer


def main(out: Path) -> None:
    from_one = out / "single" / "checkpoint-10"
    trainer = run(ZeroTrainer, out / "zero3")
    trainer.save_model(str(out / "zero3-final"))
    expect(out / "zero-parts", AdapterFileError, lambda: trainer.model.save_pretrained(out / "parts"))
    expect(out / "zero-merge", LoraError, trainer.model.merge_adapter)
    expect(out / "zero-add", LoraError, lambda: trainer.model.add_adapter("second", LoraConfig(r=2)))
    trainer._load_from_checkpoint(str(out / "zero3" / "checkpoint-10"))  # as the best model is
    write_result(out / "zero3-back", gathered_state(trainer.model))
    run(ZeroTrainer, out / "zero3-resumed", resume=out / "zero3" / "checkpoint-10")
    run(ZeroTrainer, out / "zero3-from-one", resume=from_one)
    run(ZeroTwo, out / "zero2")
    run(ZeroTwo, out / "zero2-from-one", resume=from_one)
    run(ZeroHalf, out / "zero3-bf16", max_steps=4)

    # A base that ZeRO-3 cuts up while it is loaded.
    alive = zero_config()
    base = LlamaForCausalLM.from_pretrained(out / "base")
    assert all(p.numel() == 0 for p in base.parameters()), alive
    model = apply_lora(base, LoraConfig(r=3))
    counts = trainable_parameters(model)
    randomize(model, 0, 0.05)
    run(ZeroTrainer, out / "zero3-loaded", model=model)
    (out / "zero-counts.txt").write_text(f"{counts} {trainable_parameters(model)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # It compiles C++ for more than a minute, to do what gloo does.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
