"""Engines attach a method to a model. They know models and no method."""
