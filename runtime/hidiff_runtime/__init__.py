"""Plays back a HiDiffusion bundle: picks each step's phase, draws the window shifts, applies the sampler.

Needs numpy alone; an engine's own library is imported when an engine of that backend is opened.
"""

__version__ = "0.1.0"
