"""Every random number is a pure function of what it is for.

A run that was cut off therefore resumes exactly, and two methods that share a seed see the same noise.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator


def seed_for(*what: object) -> int:
    """A 63-bit seed from names and numbers, e.g. seed_for(7, "residuals", 41, "noise")."""
    text = "/".join(map(str, what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(*what: object) -> Generator:
    """A CPU generator with that seed. Noise is sampled on the CPU, so no card and no batch size changes it."""
    from torch import Generator

    return Generator().manual_seed(seed_for(*what))
