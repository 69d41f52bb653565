"""The model families, and what HiDiffusion does to the UNet of each."""
