"""The stages of a build, in the order data flows."""
