"""Bundles inside other people's pipelines."""
