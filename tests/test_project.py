"""What a fresh install gives next year, and what the project's settings promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement):
    pinned = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_a_pin_is_a_plain_version():
    """A local suffix such as +cpu would tie the file to one place to install from."""
    for name, version in constraints().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), (name, version)


def test_nothing_that_is_installed_here_departs_from_the_pins():
    from importlib.metadata import distributions

    # Not of all of sys.path: setuptools, once imported, puts copies of its own there.
    installed = distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    pins = constraints()
    here = {canonicalize_name(d.name): d.version.split("+")[0] for d in installed if d.name}
    wrong = {name: (here[name], pins[name]) for name in here.keys() & pins.keys() if here[name] != pins[name]}
    assert not wrong, "`make install` brings the pinned versions back"


def test_the_pins_under_which_dvc_and_dagster_live_together_stand():
    names = {requirement.name: requirement for requirement in REQUIREMENTS}
    assert not names["hydra-core"].specifier.contains("1.3.8")
    assert not names["antlr4-python3-runtime"].specifier.contains("4.9.3")


def test_every_dagster_door_opens_the_same_location():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    workspace = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"][0]["python_module"]
    assert {
        tool["dagster"]["module_name"],
        tool["dg"]["project"]["code_location_target_module"],
        workspace["module_name"],
    } == {"pipelines.definitions"}


def test_dagster_keeps_its_state_in_the_project():
    settings = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    assert settings["storage"]["sqlite"]["base_dir"].startswith(".dagster/")
    assert settings["run_retries"]["retry_on_asset_or_op_failure"] is False


def test_deleting_state_keeps_results_and_concepts_that_are_gone_from_where_they_came_from(tmp_path):
    kept = [tmp_path / "data" / name for name in ("artifacts/oft/rex/a", ".work/removed/rex.1/0.png")]
    gone = [tmp_path / name for name in ("data/.work/tuning/oft/a", "data/.work/locks/b", ".dagster/history")]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True)
        path.touch()
    for _ in range(2):  # where there is nothing, there is nothing to delete
        subprocess.run(["make", "-f", ROOT / "Makefile", "clean-state"], cwd=tmp_path, check=True, capture_output=True)
    assert [path for path in (*kept, *gone) if path.exists()] == kept


def test_the_package_brings_its_data():
    """Whatever lies in the package, weights included, is installed with it."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["setuptools"]["package-data"]["personalize_core"] == ["**/*"]


def test_images_are_opened_as_the_formats_that_are_meant():
    """Without `formats`, Pillow goes by a file's content, and hands some formats to other programs."""
    found = []
    for folder in ("personalize_core", "pipelines", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            opens = [call for call in calls if ast.unparse(call.func) == "Image.open"]
            found += [path for call in opens if "formats" not in [keyword.arg for keyword in call.keywords]]
    assert found == []
