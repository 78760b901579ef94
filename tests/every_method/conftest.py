from __future__ import annotations

from functools import cache

import pytest

from personalize_core.base_model.model import BaseModel
from tests.every_method.cases import Kind, base_of


@cache
def _base(kind: Kind) -> BaseModel:
    return base_of(kind)


@pytest.fixture
def base(case) -> BaseModel:
    """The base model that a test's case asks for: one for all tests, since no method may change a bit of it."""
    return _base(case.kind)
