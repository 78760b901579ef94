"""Tests of personalize_core and pipelines, in the same rooms."""

import gc

gc.disable()  # until all is imported (see conftest.py): none of it is garbage, and searching it takes seconds
