"""Training an adapter with transformers' Trainer.

In: a model and rows. Out: an adapter, and checkpoints that contain only the adapter and the state of training.

- `trainer`: `LoraTrainer` and the mixin for any Trainer; `sft` and `preference` for TRL's, with `reference`
  and `generating`; `embedding` for those of sentence-transformers.
- `arguments`, `parsing`: command-line flags and YAML.
- `run`: from text files to a saved adapter; runs `hf-lora train`. `build`: its trainer.
- `check`, `base_model`, `output`: what a run checks before it loads the model; `schedule`: its steps and warm-up.
- `scores`: metrics of generated texts and of embeddings, also for the best checkpoint.
- `run_data`, `forecast`, `template`: its rows; what it would train and need, without weights; its options as YAML.
- `new_tokens`: rows for tokens that were added to the tokenizer.
- `initialize`: initializations that look at batches of the training data.
- `start`, `labels`, `precision`, `engines`, `optimizer`, `average`, `head_loss`, `hub_methods`, `card`: the parts of
  the trainer.
- `checkpoint/`: complete checkpoints, and resuming from them.
- `watch/`: checks during a run: layers that are not trained, values that are not finite, a loss that rises.
"""
