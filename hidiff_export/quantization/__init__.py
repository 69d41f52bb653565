"""Quantized graphs: float16 graphs whose layers compute in int8 or fp8, with ranges that NVIDIA ModelOpt measures."""
