"""These tests run where pytest loads the guard before torch, as with `make test-card`; elsewhere none is collected."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

GUARD = "tests.card.guard"
collect_ignore_glob = [] if GUARD in os.environ.get("PYTEST_PLUGINS", "") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def guarded() -> None:
    """Skip all, and say why, where there can be no pretended card."""
    from tests.card.guard import WHY_NOT

    if WHY_NOT:
        pytest.skip(WHY_NOT)


@pytest.fixture
def card(guarded: None) -> Iterator[None]:
    """A pretended card whose tensors have values."""
    from tests.card.card import pretended_card

    with pretended_card():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """For a run without pytest-xdist, whose mark it is."""
    config.addinivalue_line("markers", "xdist_group(name): tests that share a process")
