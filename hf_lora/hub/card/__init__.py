"""The model card: `README.md` of an adapter.

In: an adapter's folder and what is known of its training. Out: a README; what its author wrote in it stays.

- `write`: `write_card`, which fills `card_template.md.jinja`.
- `card_data`: what the card tells of the adapter and of its training.
- `curve`, `escape`: a picture of the losses; names and commands made harmless.
- `readme`: the part of a README that is replaced at each writing.
"""
