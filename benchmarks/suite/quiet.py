"""What libraries print of their own accord does not belong between the lines of a table."""

from __future__ import annotations

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from personalize_core.compat import hide_bars_of_transformers


def hide_notices() -> None:
    """Bars and notices; errors are still printed."""
    hide_bars_of_transformers()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
