from __future__ import annotations

import pytest

from personalize_core.base_model.model import BaseModel


@pytest.fixture
def base(case) -> BaseModel:
    """The base model that a test's case asks for."""
    return case.base()
