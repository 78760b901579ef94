"""The pipeline's definitions load without torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_pipeline_loads_without_torch():
    program = "import sys; import pipelines.definitions; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
