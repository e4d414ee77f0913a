"""From files of text to token ids and labels: the one place that knows columns, roles and separators.

In: CSV, JSON lines, Parquet, text files or `datasets`. Out: rows, prompts and labeled tokens. Training, evaluation and
generation all read their rows here.

- `columns`: the names of columns and roles, and the separators; a new form of data is an entry there.
- `tables`: rows of text from files, every fault named with its line.
- `formats`: chats, pairs of prompt and completion, or plain text, told by the columns.
- `tasks`: which task the columns are for; the labels of a text classification.
- `chat`, `spans`: rendered chats, and which of their tokens are trained.
- `prompts`, `encode`: from rows to prompts and to the tokens after which an answer begins.
"""
