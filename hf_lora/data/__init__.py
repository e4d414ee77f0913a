"""From text files to token ids and labels. Columns, roles and separators are defined here alone.

In: CSV, JSON lines, Parquet, text files or `datasets`. Out: rows, prompts and labeled tokens. Training, evaluation and
generation all use it to read their rows.

- `columns`: the names of columns and roles, and the separators; a new data format is an entry there.
- `tables`: rows of text from files; errors name the line.
- `formats`: chats, pairs of prompt and completion, or plain text, recognized by their columns.
- `tasks`: which task the columns are for; the rows of a text classification.
- `chat`, `spans`: rendered chats, and which of their tokens are trained.
- `prompts`, `encode`: from rows to prompts, and from prompts to tokens.
- `trained`: the record of a training's format, which is kept with the adapter.
"""
