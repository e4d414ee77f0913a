"""One layer with adapters: what it computes and which tensors it holds.

In: a module and the values of factors. Out: the same module, whose forward applies the adapters.

- `contract`, `registry`: the interfaces of methods, shapes and storages, and the tables that they are registered in.
- `methods/`, `inits/`, `shapes/`, `storages/`, `parts/`: the five registries, one file per entry.
- `site`, `base`, `views`, `hosts`: one weight as methods see it; layers with one weight or several; adapter tensors.
- `copies`, `fitting`, `class_swap`: whole modules per adapter, resized tensors, classes swapped in place.
- `ops`, `dropout`, `sharing`, `distributed`, `file_maps`: products, and weights that are sharded or memory-mapped.
"""
