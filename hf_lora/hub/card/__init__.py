"""The model card: `README.md` of an adapter.

In: an adapter's folder and what is known of its training. Out: a README; what its author wrote in it stays.

- `write`: `write_card`, which puts it together from `card_template.md.jinja`.
- `card_data`: what the card tells of the adapter and of its training.
- `snippets`, `curve`, `escape`: code that runs, a picture of the losses, and text from elsewhere made harmless.
- `readme`: the part of a README that is written anew each time.
"""
