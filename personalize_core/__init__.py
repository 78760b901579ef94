"""Personalize: teach a text-to-image model a concept from a few concept images, and measure how well.

Everything about the science lives here; nothing here knows of Dagster or DVC.
"""

from personalize_core import compat

compat.define_missing_torchvision_operators()
