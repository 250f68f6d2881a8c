"""Checkpoints, ours and those of other libraries: names, reading, writing, presets, adapters."""
