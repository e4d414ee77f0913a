"""Metrics, and the evaluation of language models without a Trainer.

In: a model or its outputs, and rows. Out: metrics and predictions.

- `metrics`: the table of metrics by name, and `build_compute_metrics` for Trainer.
- `classes`, `tags`, `spans`, `answers`, `similarity`: the metrics of classes, numbers, tagged words, spans and texts.
- `language`: a causal language model's loss on the answers, and its generated answers. `result`: what is returned.
"""
