"""Builds engines from portable graphs."""
