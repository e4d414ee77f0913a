"""The tasks of `hf-lora train` and `eval`. A new task is a file here, and a line in `registry`.

In: tables and a model's config. Out: rows, batches, the class of the model, and metrics.

- `base`: what a task is, and what all share. `registry`: the table of tasks by name, and which one columns are for.
- `text_classification`, `multi_label`, `token_classification`, `question_answering`, `image_classification`,
  `masked_lm`, `seq2seq_lm`, `causal_lm`, `embedding`: one task each; `preference`: `dpo`, `kto` and `reward`.
- `run`: `evaluate`, the metrics of a model on a file.
- `record`: the record of the rows of a language model, which is kept with its adapter.
"""
