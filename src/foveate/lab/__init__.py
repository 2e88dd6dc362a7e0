"""Measurements: speed, memory, accuracy. Uses the public API only, as any user would."""
