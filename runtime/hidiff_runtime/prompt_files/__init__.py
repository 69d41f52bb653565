"""Files of prompts, each read as what its ending says: the rows that `generate` and `bulk` take their values from."""
