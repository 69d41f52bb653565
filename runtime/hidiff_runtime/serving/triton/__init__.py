"""A bundle behind Triton Inference Server."""
