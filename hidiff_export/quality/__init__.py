"""What a picture costs: pictures of several bundles and of PyTorch compared, for fixed prompts and seeds."""
