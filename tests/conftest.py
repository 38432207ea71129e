"""Fixtures for all tests."""

from pathlib import Path

import pytest

from tests.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A fresh directory to run the real thing in."""
    return Lab(tmp_path)
