"""Run by test_engines.py in each of two processes: DDP and FSDP2 through LoraTrainer; results go into a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import accelerate_loop
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from engine_runs import STEPS, expect, fresh_model, run_arguments, write_result
from processes import leave
from tiny import texts

from hf_lora import LoraConfig, LoraTrainer, TrainingError, apply_lora, gathered_state
from hf_lora.errors import AdapterFileError, LoraError


class FsdpTrainer(LoraTrainer):
    """Accelerate takes its FSDP branch on accelerators only; here it is led into it."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        plugin.set_auto_wrap_policy(self.model)
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True


def run(cls: Any, folder: Path, resume: Path | None = None, best: bool = False, **values: Any) -> Any:
    more = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True} if best else {}
    trainer = cls(
        fresh_model(bf16=values.pop("bf16_base", False)),
        run_arguments(folder, per_device_train_batch_size=2, **more, **values),
        train_dataset=texts(),
        eval_dataset=texts(8, seed=9) if best else None,
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    write_result(folder, gathered_state(trainer._bare_model))
    return trainer


def main(out: Path) -> None:
    single = out / "single"
    run(LoraTrainer, out / "ddp")
    run(LoraTrainer, out / "ddp-from-one", resume=single / "checkpoint-10")
    trainer = run(FsdpTrainer, out / "fsdp-best", best=True)
    Path(out, f"best-{dist.get_rank()}.txt").write_text(trainer.state.best_model_checkpoint)
    trainer = run(FsdpTrainer, out / "fsdp")
    trainer.save_model(str(out / "fsdp-final"))
    expect(out / "fsdp-parts", AdapterFileError, lambda: trainer.model.save_pretrained(out / "parts"))
    expect(out / "fsdp-merge", LoraError, trainer.model.merge_adapter)
    expect(out / "fsdp-add", LoraError, lambda: trainer.model.add_adapter("second", LoraConfig(r=2)))
    run(FsdpTrainer, out / "fsdp-resumed", resume=out / "fsdp" / "checkpoint-10")
    run(FsdpTrainer, out / "fsdp-from-one", resume=single / "checkpoint-10")
    run(FsdpTrainer, out / "fsdp-bf16", bf16_base=True, max_steps=4)

    # A loop without a Trainer, saved and gone on with through Accelerate's own save_state.
    for name, words in (("loop", []), ("loop-resumed", ["--resume", str(out / "loop" / "step-4")])):
        sys.argv = ["accelerate_loop.py", "--output", str(out / name), "--steps", "8", "--save-every", "4", *words]
        accelerate_loop.main()
        dist.barrier()

    # One process says another rank: all of them end with the same error.
    model = apply_lora(fresh_model(adapted=False), LoraConfig(r=4 + dist.get_rank()))
    other = LoraTrainer(model, run_arguments(out / "unlike"), train_dataset=texts())
    expect(out / f"unlike-{dist.get_rank()}", TrainingError, other.train)
    # Processes that drew other values begin with the first one's all the same.
    model = fresh_model(seed=3 + dist.get_rank())
    trainer = FsdpTrainer(model, run_arguments(out / "drawn", max_steps=1, learning_rate=0.0), train_dataset=texts())
    trainer.train()
    write_result(out / "drawn", gathered_state(trainer._bare_model))


if __name__ == "__main__":
    assert STEPS == 20
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
    leave()
