"""The model card: `README.md` of an adapter.

In: an adapter's folder and facts about its training. Out: a README, in which the author's text is kept.

- `write`: `write_card`, which renders `card_template.md.jinja`.
- `card_data`: facts about the adapter and its training.
- `curve`, `escape`: a plot of the losses; escaping of names and commands.
- `readme`: the generated part of a README, which is replaced at each write.
"""
