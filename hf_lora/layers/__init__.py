"""One layer with adapters: what it computes, and what its tensors are.

In: a module and the values of factors. Out: the same module, whose forward has the adapters in it.

- `contract`, `registry`: what a method, a shape, a storage and their factors declare, and where they are registered.
- `methods/`, `inits/`, `shapes/`, `storages/`, `parts/`: the five registries, a file an entry.
- `site`, `base`, `views`, `hosts`: one weight as methods see it; layers with one weight or several; what is held.
- `copies`, `fitting`, `class_swap`: modules kept whole, tensors of another size, a class that is swapped in place.
- `ops`, `dropout`, `sharing`, `distributed`, `file_maps`: products, and weights that are sharded or maps of files.
"""
