"""Objects that look at a run while it goes on, and end it with an error where it cannot succeed.

In: the model, its gradients and losses. Out: warnings and errors.

- `base`: the moments of a run that a watch sees; one more watch is one more subclass.
- `guard`: over the first steps, is every adapted layer called, and does a gradient reach it?
- `batchnorm`: a frozen BatchNorm keeps the statistics of the base.
- `finite`: no step is made with a loss or a gradient that is not finite, and no such weight is saved.
"""
