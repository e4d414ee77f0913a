"""Merge an adapter into a checkpoint file by file, without loading the model.

In: the folders of a base model and of an adapter. Out: a folder with the merged model.

- `stream`: the merge itself; an interrupted one resumes after the last complete file.
- `plan`: every tensor of the result, and every fault, before the first byte is written.
- `lazy_model`, `naming`: a model whose weights stay in their files, and their names on disk.
- `ranges`, `writer`: tensors as byte ranges, read and written row by row.
- `original`: single weights of a checkpoint, for initializations.
- `sidecars`: the small files of the result, such as its config and tokenizer.
"""
