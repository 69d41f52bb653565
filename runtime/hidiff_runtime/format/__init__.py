"""What is on disk: the manifest and its records, paths, links and hashes, safetensors, tokenizers."""
