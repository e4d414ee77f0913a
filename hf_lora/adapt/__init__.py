"""Adapters in a model: free functions over any `nn.Module`.

In: a module and a `LoraConfig`. Out: the module with parts of adapters in it, changed in place.

- `targets`, `select`, `match`, `patterns`, `bypass`, `heads`: which modules a configuration means.
- `inject`, `statistics`, `undo`: putting an adapter in and taking it out, all or nothing.
- `state`, `walk`: the adapters of a model, and all that one of them owns.
- `merge`, `dequantize`, `ties`, `check`, `mixing`: folding adapters into weights, and arithmetic.
- `labels`, `embeddings`, `resize`, `sharing`, `checkpointing`, `gather`, `report`: what the verbs of a model need.
"""
