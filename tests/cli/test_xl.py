"""A whole run on a tiny Stable Diffusion XL: trained, sampled, scored and reported, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from personalize_core.workspace.store import Store
from tests import tiny_workspace

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")
METHODS = ("base_model", "textual_inversion", "personalized_residuals")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("xl")
    tiny_workspace.make_xl(root)
    return root


@pytest.fixture
def personalize(root: Path, personalize_in):
    return personalize_in(root)


def test_methods_are_trained_sampled_scored_and_reported(personalize, root):
    status, _, complained = personalize("run", "rex", *(word for name in METHODS for word in ("--method", name)))
    assert status == 0, complained
    store = Store(root)
    for method in METHODS:
        assert (store.scores(method, "rex") / "manifest.json").is_file()
    sizes = set()
    for path in store.grid("personalized_residuals", "rex").rglob("*.png"):
        with Image.open(path) as image:
            sizes.add(image.size)
    assert (24, 24) in sizes
    about = json.loads((store.artifact("textual_inversion", "rex") / "config.json").read_text())
    assert about["parameters"] == 32 + 16  # a pair
    proof = json.loads((store.artifact("textual_inversion", "rex") / "proof.json").read_text())
    assert proof["identical"]
    status, printed, complained = personalize("plan")
    assert status == 0 and "rex" not in printed, (printed, complained)


def test_another_image_size_makes_what_was_made_stale(personalize, root):
    values = tiny_workspace.yaml.safe_load((root / "params.yaml").read_text())
    try:
        tiny_workspace.write_params(root, values | {"image_size": None})
        status, printed, _ = personalize("plan")
        assert status == 0 and "rex" in printed
    finally:
        tiny_workspace.write_params(root, values)


def test_an_adapter_of_another_base_model_is_refused_before_anything_is_made(personalize, root):
    before = {path for path in root.rglob("*") if ".work" not in path.parts}
    status, _, complained = personalize("run", "rex", "--method", "ip_adapter")
    assert status != 0 and "the IP-Adapter 'sd15' was trained for base models whose text is 768 wide" in complained
    assert {path for path in root.rglob("*") if ".work" not in path.parts} == before


def test_a_size_that_does_not_divide_is_refused_in_one_sentence(personalize, root):
    values = tiny_workspace.yaml.safe_load((root / "params.yaml").read_text())
    try:
        tiny_workspace.write_params(root, values | {"image_size": 26})
        status, _, complained = personalize("run", "cup", "--method", "textual_inversion")
        assert status != 0 and "image_size = 26 does not divide" in complained and "multiples of 4" in complained
    finally:
        tiny_workspace.write_params(root, values)
