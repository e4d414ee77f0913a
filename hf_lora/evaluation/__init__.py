"""How good a model is on a table of rows. No Trainer is needed.

In: a model or the outputs of one, and rows. Out: numbers and predictions.

- `metrics`: from names of metrics to the function that Trainer calls after an evaluation.
- `answers`, `fallbacks`: metrics of written answers, and those that need no network.
- `run`: the loss over answers, the answers themselves, or the classes of a whole table.
"""
