"""Compiles diffusers schedulers into sampler tables."""
