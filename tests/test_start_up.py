"""Commands that compute nothing load no library that computes: held by which modules there are, not by seconds.

benchmarks/start_up.py measures what they take.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from personalize_core.workspace.store import Store
from tests import tiny_workspace

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "matplotlib", "scipy")
FOR_TABLES = ("polars", "pyarrow")


def loaded(*words: str, where: Path = ROOT) -> set[str]:
    """The heavy modules that a command has imported when it ends."""
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', *sorted(set({HEAVY + FOR_TABLES}) & set(sys.modules))))\n"
        "from personalize_core.cli.main import main\n"
        f"sys.argv = ['personalize', *{words!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["base-models"], ["protocols"], ["plan"]], ids=" ".join
)
def test_what_only_tells_loads_neither_torch_nor_tables(words):
    assert loaded(*words) == set()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One concept by the base model and by one method, made by `run`."""
    root = tmp_path_factory.mktemp("results")
    store = tiny_workspace.make(root)
    shutil.rmtree(store.concept_folder("cup"))
    tiny_workspace.write_params(root, tiny_workspace.params_of(root, ["base_model", "textual_inversion"]))
    assert "torch" in loaded("run", where=root)  # otherwise what follows would show nothing
    return root


@pytest.mark.slow
def test_a_run_with_nothing_to_do_loads_no_torch(results):
    assert loaded("run", where=results) <= set(FOR_TABLES)


@pytest.mark.slow
def test_to_explain_a_result_loads_no_torch(results):
    scores = Store(results).scores("textual_inversion", "rex")
    assert loaded("explain", str(scores), where=results) == set()
