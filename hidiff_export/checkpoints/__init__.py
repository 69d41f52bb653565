"""Checkpoints and LoRA files: finding, reading, checking and storing weights."""
