"""The marker ``needs``."""

from __future__ import annotations

from needs import pytest_runtest_setup

__all__ = ["pytest_runtest_setup"]
