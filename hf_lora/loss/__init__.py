"""What training computes besides the model itself. Functions on tensors and modules, no Trainer.

In: hidden states and labels. Out: a loss and the scores of the labels.

- `frozen_head`: the loss of a causal language model over its frozen output head, without logits.
- `packed_attention`: attention over several documents in one row.
"""
