"""Imports point one way: pipelines -> steps -> methods -> machinery; and the pipeline loads without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import personalize_core
import pipelines

CORE = Path(personalize_core.__file__).parent
PIPELINES = Path(pipelines.__file__).parent
METHODS = {path.stem for path in (CORE / "methods").glob("[!_]*.py")}
ON_TOP = {"__main__", "comparison"}  # modules of the core that may know of single methods' results or names


def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, at any depth; `from package import module` counts as package.module."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return plain | {str(n.module) for n in froms} | {f"{n.module}.{alias.name}" for n in froms for alias in n.names}


def test_the_core_knows_nothing_of_the_pipeline():
    for path in CORE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imported_by(path)} & {"dagster", "dvc", "pipelines"}, path


def test_no_method_imports_another():
    for name in METHODS:
        others = {f"personalize_core.methods.{other}" for other in METHODS - {name}}
        assert not imported_by(CORE / "methods" / f"{name}.py") & others, name


def test_the_machinery_names_no_method():
    """The loop, the sampler and the base model do not know which methods there are."""
    modules = {f"personalize_core.methods.{name}" for name in METHODS}
    for path in [*CORE.glob("*.py"), *CORE.glob("metrics/*.py")]:
        if path.stem not in ON_TOP:
            assert not imported_by(path) & modules, path


def test_the_machinery_does_not_import_the_steps():
    on_top = {"steps", "__main__", "terminal", "mini"}
    for path in CORE.rglob("*.py"):
        if path.relative_to(CORE).parts[0].removesuffix(".py") not in on_top and path.stem != "commands":
            assert not {name for name in imported_by(path) if name.startswith("personalize_core.steps")}, path


def test_the_pipeline_loads_without_torch():
    program = "import sys; import pipelines.definitions; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_pipeline_imports_torch_nowhere():
    for path in PIPELINES.rglob("*.py"):
        assert not {name.split(".")[0] for name in imported_by(path)} & {"torch", "diffusers", "transformers"}, path
