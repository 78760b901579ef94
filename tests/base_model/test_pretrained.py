"""Networks in the layouts of diffusers and transformers: every weight is the file's, or they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from personalize_core.base_model.pretrained import load_network
from personalize_core.errors import InputError
from tests.conftest import tiny_parts, tiny_xl_parts

KINDS: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "image_encoder": CLIPVisionModelWithProjection,
}
NETWORKS = [
    *(f"{family}/{part}" for family in ("sd1", "sd2") for part in ("text_encoder", "vae", "unet")),
    *(f"xl/{part}" for part in ("text_encoder", "text_encoder_2", "vae", "unet")),
    "adapter/image_encoder",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each of NETWORKS."""
    folder = tmp_path_factory.mktemp("networks")
    families = {"sd1": tiny_parts(False), "sd2": tiny_parts(True), "xl": tiny_xl_parts()}
    config: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    make: Any = CLIPVisionModelWithProjection
    with torch.random.fork_rng():
        encoder = make(CLIPVisionConfig(**config, image_size=16, patch_size=8, projection_dim=8))
    families["adapter"] = {"image_encoder": encoder}
    for name in NETWORKS:
        family, part = name.split("/")
        families[family][part].save_pretrained(folder / name)
    return folder


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Path:
    """A copy of one of them; its name says which part it is."""
    return Path(shutil.copytree(saved / request.param, tmp_path / request.param))


def load(folder: Path) -> Any:
    return load_network(KINDS[folder.name], folder)


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = weights_of(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def refusal(folder: Path) -> str:
    """That names a file of the folder, and is one sentence."""
    with pytest.raises(InputError) as refused:
        load(folder)
    said = str(refused.value)
    assert str(folder) in said and "\n" not in said
    return said


def test_every_weight_is_the_files(network):
    state, tensors = load(network).state_dict(), load_file(weights_of(network))
    assert state and all(torch.equal(state[name], each) for name, each in tensors.items() if name in state)
    assert {name.removeprefix("text_model.") for name in tensors} == {n.removeprefix("text_model.") for n in state}


@pytest.mark.parametrize("place", [0, -1], ids=["the first", "the last"])
def test_a_weight_that_the_file_lacks_is_named_and_not_made_up(network, place):
    """Each network has such a weight at either end of its file."""
    lost = []
    path = rewrite(network, lambda tensors: lost.append([*tensors][place]) or tensors.pop(lost[0]))
    said = refusal(network)
    assert said.startswith(f"{path} lacks the weight ") and lost[0].removeprefix("text_model.") in said


def test_of_many_that_it_lacks_the_first_is_named_and_how_many(network):
    path = rewrite(network, lambda tensors: [tensors.pop(name) for name in [*tensors][3:8]])
    assert refusal(network).startswith(f"{path} lacks 5 weights, first ")


def test_a_weight_of_another_shape_is_named_with_both(network):
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name, each in tensors.items() if each.ndim == 2 and "embedding" not in name)
        changed.extend([name.removeprefix("text_model."), tuple(tensors[name].shape)])
        tensors[name] = torch.cat([tensors[name]] * 2)

    changed: list[Any] = []
    rewrite(network, widen)
    name, (rows, columns) = changed
    said = refusal(network)
    assert f"{name} of shape {(2 * rows, columns)}" in said and f"one of shape {(rows, columns)}" in said


def test_a_weight_that_has_no_place_is_refused(network):
    """As where config.json says of fewer layers than there are: the rest would be left out."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if ".0." in name)
        tensors[name.replace(".0.", ".7.")] = tensors[name].clone()

    path = rewrite(network, add)
    said = refusal(network)
    assert said.startswith(f"{path} holds the weight ") and "has no place" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_weights_name(network, value):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = [*tensors][len(tensors) // 2]
        spoilt.append(name.removeprefix("text_model."))
        tensors[name].view(-1)[-1] = value

    spoilt: list[str] = []
    path = rewrite(network, spoil)
    said = refusal(network)
    assert said.startswith(f"{path} holds numbers that are not finite, in ") and spoilt[0] in said


def test_weights_whose_sum_is_too_large_for_a_float_are_no_fault(network):
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        next(each for each in tensors.values() if each.numel() > 4).fill_(1e38)

    rewrite(network, enlarge)
    assert load(network) is not None


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "no safetensors", "cut short"])
def test_a_damaged_file_is_named(network, content):
    path = weights_of(network)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert refusal(network).startswith(f"{path} is no safetensors file, or a damaged one; fetch or save it again")


@pytest.mark.parametrize("content", ["[]", "{ not", "{}", "null"])
def test_a_configuration_that_is_none_is_named(network, content):
    (network / "config.json").write_text(content)
    assert "config.json" in refusal(network)


@pytest.mark.parametrize("damage", ["gone", "another", "no map"])
def test_weights_in_several_files_are_read_whole_or_refused(damage, network):
    network_of = load(network)
    half = sum(each.nbytes for each in network_of.state_dict().values()) // 2
    weights_of(network).unlink()
    network_of.save_pretrained(network, max_shard_size=half)
    first, *rest = sorted(network.glob("*.safetensors"))
    (index,) = network.glob("*.index.json")
    assert rest and load(network) is not None
    if damage == "no map":
        index.write_text(json.dumps({"weight_map": 3}))
        assert refusal(network).startswith(f"{index} should say in which file each weight is")
    elif damage == "gone":
        first.unlink()
        assert refusal(network).startswith(f"{first} does not exist; ")
    else:
        lost = next(iter(load_file(first)))
        save_file({n: each for n, each in load_file(first).items() if n != lost}, first, metadata={"format": "pt"})
        assert lost in refusal(network)


def test_no_weights_and_pickled_ones_are_refused(network):
    path = weights_of(network)
    path.unlink()
    assert refusal(network) == f"{network} holds no weights; put {path.name} there"
    (network / "pytorch_model.bin").write_bytes(b"x")
    assert "is a pickle, which can run any program when it is read" in refusal(network)


def test_what_a_file_holds_of_another_network_is_left_out(saved, tmp_path):
    """CLIP's whole file serves for its text encoder, and old files hold the numbers of the positions."""
    folder = Path(shutil.copytree(saved / "sd1/text_encoder", tmp_path / "text_encoder"))
    more = {"vision_model.x": torch.zeros(2), "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
    rewrite(folder, lambda tensors: tensors.update(more | {"embeddings.position_ids": torch.arange(77)[None]}))
    assert torch.equal(load(folder).state_dict()["final_layer_norm.weight"], torch.ones(32))


def test_nothing_is_logged_of_what_is_refused(saved, tmp_path, caplog, capsys):
    folder = Path(shutil.copytree(saved / "xl/text_encoder_2", tmp_path / "text_encoder_2"))
    rewrite(folder, lambda tensors: tensors.pop("text_projection.weight"))
    refusal(folder)
    assert capsys.readouterr() == ("", "") and caplog.text == ""
