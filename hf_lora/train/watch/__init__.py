"""Objects that look at a run while it goes on, and end it with an error where it would be in vain.

In: the model, its gradients and losses. Out: warnings and errors.

- `guard`: over the first steps, does every adapted layer take part, and does it learn?
- `finite`: no step is made with a loss or a gradient that is not finite.
"""
