"""Compares a bundle with the reference, and reports."""
