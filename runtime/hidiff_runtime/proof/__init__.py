"""What PyTorch computed when a bundle was built, recorded, and asked again of engines anywhere else."""
