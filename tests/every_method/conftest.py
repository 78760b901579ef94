from __future__ import annotations

from functools import cache

import pytest

from personalize_core.base_model.model import BaseModel
from tests.conftest import tiny_base


@cache
def _base(linear: bool) -> BaseModel:
    return tiny_base(linear)


@pytest.fixture
def base(case) -> BaseModel:
    """The base model that a test's case asks for: one for all tests, since no method may change a bit of it."""
    return _base(case.linear)
