"""Writes what others serve: Triton model repositories of a bundle."""
