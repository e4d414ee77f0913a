"""How good a model is on a table of rows. No Trainer is needed.

In: a model or the outputs of one, and rows. Out: numbers and predictions.

- `metrics`: the table of metrics by name, and the function of them that Trainer calls after an evaluation.
- `classes`, `answers`: the metrics themselves, of numbers and of written answers.
- `run`: `evaluate`: the loss over answers, the answers themselves, or the classes of a whole file.
"""
