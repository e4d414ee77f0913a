"""Adapters in a model: free functions over any `nn.Module`.

In: a module and a `LoraConfig`. Out: the module, changed in place, with the parts of adapters.

- `request`, `targets`, `select`, `match`, `patterns`, `bypass`, `heads`: what a configuration selects.
- `inject`, `statistics`: adding, reinitializing and removing an adapter. `undo`: every change is all or nothing.
- `state`, `walk`: the adapters of a model and everything that they own. `activation`: which of them act.
- `merge`, `folding`, `dequantize`, `ties`, `check`, `mixing`: folding adapters into weights, and scaling them.
- `calls`: what the layers must know about a call of the model.
- `labels`, `embeddings`, `resize`, `sharing`, `checkpointing`, `gather`, `report`: for the methods of `LoraModel`.
- `inner`: transformers models inside other modules, and what a model with adapters refuses.
"""
