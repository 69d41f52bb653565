"""Prompts: into tokens, and through the text encoders."""
