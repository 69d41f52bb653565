"""Pictures: in from files, through the VAE in tiles, out as PNG, side by side, and measured."""
