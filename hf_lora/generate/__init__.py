"""Text from a language model with an adapter.

In: a model or an adapter, and prompts. Out: answers.

- `loading`: a model and its tokenizer, from an adapter or a full model.
- `texts`: answers to a list of prompts, or to a file of them.
- `conversation`: a chat that keeps what was said.
"""
