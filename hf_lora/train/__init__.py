"""Training an adapter with transformers' Trainer.

In: a model and rows. Out: an adapter and checkpoints that hold the adapter alone.

- `trainer`: `LoraTrainer` and the mixin that does the same to any Trainer; `sft` for TRL's.
- `arguments`, `parsing`: flags, YAML and what they may say.
- `run`: from files of text to a saved adapter, which is what `hf-lora train` does.
- `start`, `precision`, `engines`, `optimizer`, `head_loss`, `card`: what the trainer does at which moment.
- `checkpoint/`: checkpoints that are complete or do not count, and resuming from them.
- `watch/`: objects that look at a run: layers that do not learn, values that are not finite.
"""
