"""From prompts to images: requests, text encoding, the VAE in tiles, and image files."""
