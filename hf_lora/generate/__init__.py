"""Text generation with a language model and an adapter.

In: a model or an adapter, and prompts. Out: answers.

- `loading`: a model and its tokenizer, from an adapter or a full model.
- `texts`: answers to a list of prompts, or to the prompts in a file.
- `conversation`: a multi-turn chat.
"""
