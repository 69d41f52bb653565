"""From embeddings to latents: conditioning, the loops over the steps, and the ControlNet."""
