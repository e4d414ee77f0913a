"""Evaluation of models, without a Trainer.

In: a model or its outputs, and rows. Out: metrics and predictions.

- `metrics`: the table of metrics by name, and `build_compute_metrics` for Trainer.
- `classes`, `answers`: the metrics themselves, for arrays of numbers and for generated answers.
- `run`: `evaluate`: the loss on answers, generated answers, or predicted classes for a whole file.
"""
