"""Checkpoints of other libraries: names, reading, presets."""
