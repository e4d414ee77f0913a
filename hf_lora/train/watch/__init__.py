"""Callbacks that check a run during training, and stop it with an error if it cannot succeed.

In: the model, its gradients and losses. Out: warnings and errors.

- `base`: the base class `Watch`; a new check is a subclass, added in `LoraTrainerMixin.__init__` or as a callback.
- `guard`: during the first steps, is every adapted layer called, and does a gradient reach it?
- `batchnorm`: a frozen BatchNorm keeps the statistics of the base.
- `finite`: no optimizer step with a non-finite loss or gradient, and no such weight is saved.
"""
