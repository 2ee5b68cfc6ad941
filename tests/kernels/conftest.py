"""The loaded C library, which a test may put another result in the place of."""

import pytest

from ghm_d2.kernels import cpu


@pytest.fixture
def library(monkeypatch):
    """Puts another result in the place of the loaded library, until the test ends."""
    return lambda found: monkeypatch.setattr(cpu, "_library", lambda: found)
