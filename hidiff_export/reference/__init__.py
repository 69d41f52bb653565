"""What float32 PyTorch computes for a bundle's weights: inputs, evaluations to ask for, and bounds."""
