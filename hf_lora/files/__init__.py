"""Adapters on disk, in PEFT's format with `hf_lora.json` beside it.

In: a model with adapters, or a folder. Out: a folder, or an adapter in the model.

- `format`, `keys`: the names of files and tensors on disk; no other file knows them.
- `foreign`, `tied`: tensors that other libraries write in other ways.
- `joined`: one module in training that is several in a loaded base. `places`: a module at several places.
- `save`, `load`: everything is checked before anything is changed.
- `model_class`: the class of transformers that a file is for. `heads`: those for other labels than the model's.
- `vocabulary`: its size in training, and in the base.
- `initializations`: what the initialization that a file names means for reading it.
- `names`, `renamed`: which modules the names in a file mean to PEFT, and names of an older transformers.
- `validate`: what the JSON of an adapter may say.
- `identity`, `commit`: which base model an adapter belongs to.
- `inspect`: what a file holds, without the base model.
- `convert`: old files whose tensors are a pickle.
"""
