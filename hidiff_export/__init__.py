"""Compiles HiDiffusion-patched Stable Diffusion UNets into phase-specific graphs and engines."""

from hidiff_runtime import __version__

__all__ = ["__version__"]
