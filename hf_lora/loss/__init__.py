"""Losses and attention for training: functions on tensors and modules, without a Trainer.

In: hidden states and labels. Out: a loss and the scores of the labels.

- `frozen_head`: the loss of a causal language model over its frozen output head, without logits.
- `packed_attention`: attention for rows that contain several documents.
"""
