"""Classifiers on the sentence vector of a checkpoint, for models whose own classifier reads another feature.

A sentence-transformers checkpoint says how a text becomes one vector, such as the mean over its tokens. The classes of
transformers read the first or the last token instead, which nobody trained to hold the meaning of the text.

In: a checkpoint, and the hidden states of its body. Out: a transformers model for sequence classification.

- `pooling`: what a sentence vector is made of, and how.
- `declared`: the sentence vector that a checkpoint declares.
- `model`: the classifier, a class for each body of transformers.
- `build`: a classifier for a checkpoint: with the task's own class where that reads the feature, else with ours.
- `head_start`: a new head that starts at the class means of the frozen feature.
- `export`: the same classifier as a folder of sentence-transformers.
"""
