"""Schedulers as tables of numbers, their state in a run, and torch's random numbers."""
