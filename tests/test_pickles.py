"""No pickle is ever read: whatever loads weights refuses one, in a sentence, before anything in it can run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import personalize_core
import pipelines
from personalize_core.artifacts import saving
from personalize_core.artifacts.description import WEIGHTS
from personalize_core.base_model.loading import load_base_model
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import method_class, recipe_class
from personalize_core.metrics.encoders import load_identity_encoder, load_text_image_encoder
from personalize_core.metrics.masks import load_segmenter
from tests.conftest import stock_pipeline, tiny_base, tiny_parts


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def as_torch_saves(path: Path, trap: Trap) -> None:
    torch.save({"weight": torch.ones(1), "trap": trap}, path)


def as_python_saves(path: Path, trap: Trap) -> None:
    path.write_bytes(pickle.dumps(trap))


@pytest.fixture(params=[as_torch_saves, as_python_saves])
def pickled(request, tmp_path) -> Iterator[Callable[[Path], Path]]:
    """Writes a pickle that would leave `tmp_path / "sprung"` behind; returns where it is."""

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        request.param(path, Trap(tmp_path / "sprung"))
        return path

    yield write
    assert not (tmp_path / "sprung").exists()


def test_the_traps_do_spring(tmp_path):
    as_python_saves(tmp_path / "x", Trap(tmp_path / "python"))
    pickle.loads((tmp_path / "x").read_bytes())
    as_torch_saves(tmp_path / "y", Trap(tmp_path / "torch"))
    torch.load(tmp_path / "y", weights_only=False)
    assert (tmp_path / "python").exists() and (tmp_path / "torch").exists()


def refused(load: Callable[[], Any], path: Path, converts: bool) -> None:
    with pytest.raises(InputError) as error:
        load()
    said = str(error.value)
    assert "\n" not in said and (not converts or f"{path} is a pickle" in said and "save_file(torch.load(" in said)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    stock_pipeline(tiny_parts()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "part, stem", [("text_encoder", "model"), ("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model")]
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_base_model_is_no_pickle(part, stem, suffix, base_folder, pickled, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / part / f"{stem}.safetensors").unlink()
    name = "pytorch_model.bin" if (part, suffix) == ("text_encoder", ".bin") else f"{stem}{suffix}"
    path = pickled(folder / part / name)
    refused(lambda: load_base_model(str(folder)), path, converts=suffix == ".bin")


LOADERS = {  # of a folder; what stands in it beside the weights
    load_text_image_encoder: {"open_clip_config.json": {"model_cfg": {}, "preprocess_cfg": {}}},
    load_identity_encoder: {"config.json": {"model_type": "vit"}},
    load_segmenter: {"config.json": {"model_type": "clipseg"}},
}


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "model.safetensors"])
def test_an_encoder_or_segmenter_is_no_pickle(load, name, pickled, tmp_path):
    path = pickled(tmp_path / "encoder" / name)
    for beside, content in LOADERS[load].items():
        (path.parent / beside).write_text(json.dumps(content))
    refused(lambda: load(str(path.parent)), path, converts=path.suffix != ".safetensors")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights", "weights.safetensors"])
def test_the_file_of_a_published_encoder_is_no_pickle(name, pickled, tmp_path):
    path = pickled(tmp_path / name)
    refused(lambda: load_text_image_encoder(f"clip-b32:{path}"), path, converts=path.suffix in (".bin", ".pt"))


def test_a_pickle_beside_the_weights_is_left_alone(pickled, tmp_path):
    """open_clip prefers one of this name to weights by any other name."""
    import open_clip
    from safetensors.torch import save_file

    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": small, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    pickled(tmp_path / "open_clip_pytorch_model.bin")
    ours: Any = load_text_image_encoder(tmp_path)
    state = ours.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_an_artifact_is_no_pickle(pickled, tmp_path):
    base = tiny_base()
    kind: Any = method_class("textual_inversion")
    saving.save(
        tmp_path,
        "textual_inversion",
        kind(recipe_class("textual_inversion")(), base, Concept("v", "<v>", "dog")),
        base,
        0,
    )
    path = pickled(tmp_path / WEIGHTS)
    refused(lambda: saving.restore(tmp_path, base), path, converts=False)


# Imports of other programs' files are opened with a trap in tests/artifacts/test_foreign.py and test_import.py.


@cache
def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the sources that may load something, with the name that it is written by."""
    found = []
    for package in (personalize_core, pipelines):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            if any(word in (text := path.read_text()) for word in ("load", "pickle", "from_pretrained")):
                found += [
                    (ast.unparse(node.func), node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
                ]
    return found


def test_nothing_in_the_sources_can_read_a_pickle():
    readers = ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle")
    assert not [name for name, _ in calls() if name in readers]
    assert not [name for name, call in calls() if any(one.arg == "allow_pickle" for one in call.keywords)]  # numpy's


def test_whatever_loads_weights_by_a_library_asks_for_safetensors():
    without_weights = ("DDPMScheduler", "CLIPTokenizer", "AutoTokenizer", "AutoProcessor")
    loads = [(name, call) for name, call in calls() if name.endswith(".from_pretrained")]
    weights = [(name, call) for name, call in loads if not name.startswith(without_weights)]
    assert len(weights) >= 5
    for name, call in weights:
        asked = {one.arg: one.value for one in call.keywords}.get("use_safetensors")
        assert isinstance(asked, ast.Constant) and asked.value is True, name
