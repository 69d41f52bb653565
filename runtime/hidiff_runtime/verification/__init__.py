"""What PyTorch computed when a bundle was built, compared with what the engines compute here."""
