"""Engines attach a method to a model. They know models and no method."""

import foveate.families.releases  # noqa: F401 - refuses a transformers too old, before names are sought in it
