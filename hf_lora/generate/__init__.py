"""Text from a language model with an adapter.

In: a model or an adapter, and prompts. Out: answers.

- `texts`: loading for generation, and `generate_texts` for a list of prompts.
- `conversation`: a chat that keeps what was said.
"""
