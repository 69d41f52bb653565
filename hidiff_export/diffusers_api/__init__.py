"""HiDiffusion and bundles inside diffusers pipelines, for people who stay in PyTorch."""
