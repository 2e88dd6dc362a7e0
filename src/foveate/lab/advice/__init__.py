"""The adviser: a short profile of a model on this machine, what it predicts, and what to do with that."""
