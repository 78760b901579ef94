"""IP-Adapter against diffusers' own pipeline and a naive decoupled attention, with a tiny random adapter."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from personalize_core import steps
from personalize_core.artifacts import saving
from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.loading import load_base_model
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts import image_files
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.methods.interface import SeesImages
from personalize_core.methods.ip_adapter.method import Adapter, IPAdapter
from personalize_core.methods.ip_adapter.recipe import ADAPTERS, Config, Sampling
from personalize_core.sampling.sampler import initial_noise
from personalize_core.steps.input_checks import problems_of
from personalize_core.workspace.recipes import load_base
from personalize_core.workspace.stamps.training import train_stamp
from tests import tiny_workspace
from tests.conftest import (
    equal_bits,
    predict,
    sample_latents,
    snapshot,
    stock_pipeline,
    tiny_base,
    tiny_parts,
    tiny_xl,
    tiny_xl_parts,
)
from tests.tiny_adapter import WEIGHTS, write_adapter

TOLERANCE = 1e-5


def images(count: int = 3) -> list[Image.Image]:
    """Larger than the encoder sees, and not square."""
    generator = np.random.default_rng(2)
    return [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


@pytest.fixture
def method(base, concept, folder) -> IPAdapter:
    seen = IPAdapter(Config(adapter=str(folder)), base, concept).eval()
    seen.see(images(), base)
    seen.sampling = Sampling(scale=0.7)
    return seen


def embeddings(folder: Path, shown: list[Image.Image]) -> torch.Tensor:
    """(n, 12), as diffusers' pipeline computes them: all images at once."""
    encoder: Any = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    prepare: Any = CLIPImageProcessor(size=16, crop_size=16)
    with torch.no_grad():
        return encoder(prepare(shown, return_tensors="pt").pixel_values).image_embeds


def stock(base: BaseModel, folder: Path, scale: float) -> Any:
    """Diffusers' pipeline with networks of its own and the same weights; its own loader reads the adapter."""
    parts = tiny_xl_parts() if len(base.text_encoders) > 1 else tiny_parts(base.unet.config.use_linear_projection)
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
    pipe = stock_pipeline(parts)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=WEIGHTS, image_encoder_folder="image_encoder")
    pipe.set_ip_adapter_scale(scale)
    return pipe


def sampled_by_stock(base: BaseModel, folder: Path, scale: float, **image: Any) -> torch.Tensor:
    """What that pipeline samples from the first noise of ours; image: which it sees, as the pipeline takes it."""
    return stock(base, folder, scale)(
        "a photo of a dog on the beach",
        latents=initial_noise(base, 0, [(0, 0)]),
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="latent",
        height=base.image_size,
        width=base.image_size,
        **image,
    ).images


@pytest.mark.parametrize("scale", [0.7, 1.0])
def test_it_samples_what_diffusers_own_pipeline_samples_from_the_same_noise(method, base, folder, scale):
    method.sampling = Sampling(scale=scale)
    ours = sample_latents(method, base, [method.say("a photo of a {} on the beach")], steps=2, guidance=2.0)
    mean = embeddings(folder, images()).mean(dim=0)[None, None]  # (1, 1, 12)
    both = torch.cat([torch.zeros_like(mean), mean])  # the prompt-free half of guidance first
    theirs = sampled_by_stock(base, folder, scale, ip_adapter_image_embeds=[both])
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_on_stable_diffusion_xl_it_samples_what_diffusers_own_pipeline_samples(concept, tmp_path):
    xl = tiny_xl()
    folder = write_adapter(tmp_path / "adapter", xl)
    method = IPAdapter(Config(adapter=str(folder)), xl, concept).eval()
    (shown,) = images(1)
    method.see([shown], xl)
    method.sampling = Sampling(scale=0.7)
    ours = sample_latents(method, xl, [method.say("a photo of a {} on the beach")], steps=2, guidance=2.0)
    theirs = sampled_by_stock(xl, folder, 0.7, ip_adapter_image=shown)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    method.sampling = Sampling(scale=0.0)
    without = sample_latents(method, xl, [method.say("a photo of a {} on the beach")], steps=2, guidance=2.0)
    assert (ours - without).abs().max() > 100 * TOLERANCE


def test_of_one_image_the_pipeline_that_is_given_the_image_itself_samples_the_same(method, base, folder):
    (shown,) = images(1)
    method.see([shown], base)
    ours = sample_latents(method, base, [method.say("a photo of a {} on the beach")], steps=2, guidance=2.0)
    theirs = sampled_by_stock(base, folder, 0.7, ip_adapter_image=shown)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_each_layer_computes_a_naive_decoupled_attention(method, base, folder):
    """Eq. 5 head by head and location by location, from the adapter's file; in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    mean = embeddings(folder, images()).double().mean(dim=0)
    tokens = (weights["image_proj.proj.weight"] @ mean + weights["image_proj.proj.bias"]).view(4, -1)
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    normed = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    tokens = normed * weights["image_proj.norm.weight"] + weights["image_proj.norm.bias"]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    paths = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    hooks = [
        base.unet.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.update({path: (args[0], output)})
        )
        for path in paths
        if path.endswith("attn2")
    ]
    context = base.encode(["a photo of a dog on the beach"])
    with method.attach(base):
        predict(base, context)
    for hook in hooks:
        hook.remove()

    def attention(q, k, v):  # (d,), (L, d), (L, d)
        scores = torch.stack([torch.dot(q, each) for each in k]) / len(q) ** 0.5
        share = scores.exp() / scores.exp().sum()
        return sum((p * each for p, each in zip(share, v, strict=True)), torch.zeros_like(q))

    assert len(seen) == len(base.layers)
    for path, (hidden, output) in seen.items():
        layer: Any = base.unet.get_submodule(path)
        index = paths.index(path)
        W = {name: getattr(layer, f"to_{name}").weight.double() for name in "qkv"}
        text, hidden = context.hidden[0].double(), hidden[0].double()
        image_k = tokens @ weights[f"ip_adapter.{index}.to_k_ip.weight"].T
        image_v = tokens @ weights[f"ip_adapter.{index}.to_v_ip.weight"].T
        q, k, v = hidden @ W["q"].T, text @ W["k"].T, text @ W["v"].T
        d = q.shape[1] // layer.heads
        rows = []
        for row in q:
            parts = []
            for head in range(layer.heads):
                part = slice(head * d, (head + 1) * d)
                of_text = attention(row[part], k[:, part], v[:, part])
                parts.append(of_text + 0.7 * attention(row[part], image_k[:, part], image_v[:, part]))
            rows.append(layer.to_out[0].weight.double() @ torch.cat(parts) + layer.to_out[0].bias.double())
        torch.testing.assert_close(output[0].double(), torch.stack(rows), atol=TOLERANCE, rtol=0)


def test_with_a_scale_of_zero_it_is_the_base_model_that_reads_the_class_noun(method, base):
    context = base.encode([method.say("a photo of a {}")])
    expected = predict(base, context)
    method.sampling = Sampling(scale=0.0)
    with method.attach(base):
        assert torch.equal(predict(base, context), expected)
    method.sampling = Sampling()
    with method.attach(base):
        assert not torch.equal(predict(base, context), expected)


def test_it_leaves_no_trace_in_the_base_model(method, base):
    before, processors = snapshot(base), dict(base.unet.attn_processors)
    expected = predict(base, base.encode(["a dog"]))
    sample_latents(method, base, [method.say("a photo of a {}")])
    assert equal_bits(snapshot(base), before)
    assert base.unet.attn_processors == processors and base.unet.encoder_hid_proj is None
    assert base.unet.config.encoder_hid_dim_type is None
    assert torch.equal(predict(base, base.encode(["a dog"])), expected)


def test_the_words_attention_maps_are_those_of_the_words_alone(method, base):
    maps = AttentionMaps()
    with method.attach(base), torch.no_grad():
        base.denoise(torch.randn(1, 4, 8, 8), torch.tensor([500]), base.encode(["a dog"]), maps)
    assert {maps[layer].shape[-1] for layer in maps} == {77} and len(maps) == len(base.layers)


def test_it_learns_nothing_and_sees_images(method):
    assert list(method.parameters()) == [] and method.stages() == []
    kept = method.state_dict()
    assert {name: tuple(tensor.shape)[:2] for name, tensor in kept.items()} == dict.fromkeys(kept, (2, 4))
    assert isinstance(method, SeesImages)


# Where there is no adapter that fits


def test_the_published_adapter_is_refused_on_another_base_model_before_anything_is_fetched(concept):
    base = load_base_model("mini", device="cpu")
    with pytest.raises(InputError, match="text is 768 wide, and that of 'mini' is 128 wide; give methods.ip_adapter"):
        IPAdapter(Config(), base, concept).check_sight(base)


def test_an_adapter_of_another_width_is_refused(base, concept, folder):
    other = load_base_model("mini", device="cpu")
    with pytest.raises(InputError, match="text is 32 wide, and that of 'mini' is 128 wide"):
        IPAdapter(Config(adapter=str(folder)), other, concept).check_sight(other)


def test_adapters_of_other_kinds_are_refused(base, concept, folder):
    weights = load_file(folder / WEIGHTS)
    save_file({name.replace("proj.weight", "proj_in.weight"): t for name, t in weights.items()}, folder / WEIGHTS)
    with pytest.raises(InputError, match="those called plus, full or FaceID are not read here"):
        IPAdapter(Config(adapter=str(folder)), base, concept).check_sight(base)


@pytest.mark.parametrize(
    "missing, said",
    [
        (
            WEIGHTS,
            "adapter holds no weights of an IP-Adapter; put there one safetensors file of weights and, in image_",
        ),
        (
            "image_encoder",
            "image_encoder does not exist; put there the image encoder that the adapter was trained with",
        ),
        (
            "image_encoder/model.safetensors",
            "image_encoder holds no weights of an image encoder; put model.safetensors",
        ),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_with_what_it_lacks(folder, missing, said):
    (folder / missing).rename(folder.parent / "elsewhere")
    with pytest.raises(InputError, match=said):
        _ = Config(adapter=str(folder)).files


def test_two_adapters_in_one_folder_are_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "another.safetensors")
    with pytest.raises(InputError, match="holds another.safetensors and ip_adapter.safetensors; leave there one"):
        _ = Config(adapter=str(folder)).files


@pytest.mark.parametrize("part", [WEIGHTS, "image_encoder/model.safetensors"])
def test_of_a_pickle_it_is_said_how_it_is_converted_and_so_converted_it_is_read(base, concept, folder, part):
    """As the authors publish theirs: of the adapter, the tensors of each part in a dictionary of its own."""
    file = folder / part
    tensors: Any = load_file(file)
    if part == WEIGHTS:
        nested: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            nested.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor
        tensors = nested
    pickled = file.with_name("ip_adapter.bin" if part == WEIGHTS else "pytorch_model.bin")
    torch.save(tensors, pickled)
    file.unlink()
    with pytest.raises(InputError, match=f"{pickled} is a pickle, .* convert it: ") as refused:
        _ = Config(adapter=str(folder)).files
    program = str(refused.value).partition("convert it: ")[2].replace("safetensors.torch.save_file", "save_file")
    with contextlib.chdir(pickled.parent):
        exec(program, {"torch": torch, "save_file": save_file})  # what we tell people to run
    pickled.unlink()
    IPAdapter(Config(adapter=str(folder)), base, concept).check_sight(base)


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    """A file of tensors or of settings, changed in place."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def lacking(name: str) -> Callable[[Any], Any]:
    return lambda values: values.pop(name)


def with_(**values: Any) -> Callable[[Any], Any]:
    """Names with "__" for a point."""
    return lambda all_: all_.update({name.replace("__", "."): value for name, value in values.items()})


ENCODER, SETTINGS = "image_encoder/model.safetensors", "image_encoder/config.json"
NAN, INF = float("nan"), float("inf")
DAMAGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "lacks a layer": (WEIGHTS, lacking("ip_adapter.3.to_v_ip.weight"), "lacks ip_adapter.3.to_v_ip.weight"),
    "lacks a bias": (WEIGHTS, lacking("image_proj.proj.bias"), "lacks image_proj.proj.bias"),
    "has a layer more": (WEIGHTS, with_(ip_adapter__33__to_v_ip__weight=torch.ones(2, 2)), "also has ip_adapter.33.to"),
    "another width": (
        WEIGHTS,
        with_(ip_adapter__1__to_k_ip__weight=torch.ones(16, 16)),
        "16 x 16, and should be 16 x 32",
    ),
    "no number": (WEIGHTS, with_(image_proj__norm__bias=torch.full((32,), NAN)), "not a number"),
    "an endless number": (WEIGHTS, with_(ip_adapter__1__to_v_ip__weight=torch.full((16, 32), INF)), "are infinite"),
    "of another encoder": (
        WEIGHTS,
        with_(image_proj__proj__weight=torch.ones(128, 8)),
        "8 wide, and those of .* 12 wide",
    ),
    "encoder lacks a bias": (ENCODER, lacking("vision_model.encoder.layers.1.mlp.fc2.bias"), "layers.1.mlp.fc2.bias"),
    "encoder lacks its end": (
        ENCODER,
        lacking("visual_projection.weight"),
        "lacks the weight visual_projection.weight",
    ),
    "encoder, no number": (ENCODER, with_(visual_projection__weight=torch.full((12, 16), NAN)), "not finite"),
    "encoder of another width": (SETTINGS, with_(projection_dim=8), "describes one of shape"),
    "encoder's width in words": (SETTINGS, with_(hidden_size="wide"), "describes no CLIPVisionModelWithProjection"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_of_another_network_is_refused_before_and_when_it_sees(damage, base, concept, folder):
    """Were the missing made up, as the libraries do, the artifact would hold what no adapter sees."""
    part, change, said = DAMAGES[damage]
    rewritten(folder / part, change)
    method = IPAdapter(Config(adapter=str(folder)), base, concept)
    for act in (lambda: method.check_sight(base), lambda: method.see(images(), base)):
        with pytest.raises(InputError, match=said) as refused:
            act()
        assert str((folder / part).parent) in str(refused.value) and "\n" not in str(refused.value)
    assert not any(kept.any() for kept in method.state_dict().values())


def test_settings_of_the_encoder_that_are_no_object_are_refused(base, concept, folder):
    (folder / SETTINGS).write_text("[]")
    with pytest.raises(InputError, match=f"{folder / SETTINGS} should hold a JSON object"):
        IPAdapter(Config(adapter=str(folder)), base, concept).check_sight(base)


@pytest.mark.parametrize("part", [WEIGHTS, ENCODER])
@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "no safetensors", "cut short"])
def test_a_file_that_is_no_safetensors_is_named(content, part, base, concept, folder):
    whole = (folder / part).read_bytes()
    (folder / part).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=f"{folder / part} is no safetensors file, or a damaged one"):
        IPAdapter(Config(adapter=str(folder)), base, concept).check_sight(base)


def test_a_name_that_is_no_adapter_is_refused(base, concept):
    with pytest.raises(InputError, match="there is no IP-Adapter 'sd16'; known are sd15 and sdxl, or a folder"):
        IPAdapter(Config(adapter="sd16"), base, concept).check_sight(base)


def test_published_adapters_are_pinned_to_a_commit_and_are_safetensors():
    for known in ADAPTERS.values():
        assert len(known.revision) == 40 and known.weights.endswith(".safetensors")


# As a column


@pytest.fixture
def store(tmp_path):
    return workspace(tmp_path)


def workspace(root: Path):
    """A workspace with an adapter, in which nothing else is run."""
    tiny_workspace.make(root)
    write_adapter(root / "adapter", tiny_base())
    values = tiny_workspace.params(root)
    values["methods"] = {"ip_adapter": {values["base_model"]: {"adapter": str(root / "adapter")}}}
    values["variants"] = {"ip_adapter": {"ip_adapter": {}, "ip_adapter_full": {"scale": 1.0}}}
    return tiny_workspace.write_params(root, values)


@pytest.mark.usefixtures("short_checks")
def test_a_column_is_made_without_training_and_proved(store):
    assert problems_of(store, ["rex"], ["ip_adapter"]) == []
    report = steps.train(store, "rex", "ip_adapter")
    folder = store.artifact("ip_adapter", "rex")
    assert report.metrics["parameters"] == 0 and report.metrics["restored_samples_otherwise_by"] == 0
    assert not store.training_costs("ip_adapter", "rex").exists()
    base = load_base(store)
    again = IPAdapter(store.params.config("ip_adapter"), base, store.concept("rex"))
    again.see([image_files.load_image(path) for path in sorted(store.concept_folder("rex").glob("*.png"))], base)
    assert equal_bits(dict(saving.restore(folder, base).state_dict()), dict(again.state_dict()))
    shutil.rmtree(Path(store.params.config("ip_adapter").adapter))  # sampling needs none of it
    trained = saving.restore(folder, base)
    assert torch.equal(sample_latents(trained, base, ["a dog"]), sample_latents(again.eval(), base, ["a dog"]))


@pytest.mark.usefixtures("short_checks", "no_scatter_plot")
def test_scales_are_variants_of_one_artifact(store):
    steps.train(store, "rex", "ip_adapter")
    grid = steps.sample_grid(store, "rex", "ip_adapter").path
    assert read_json(grid / "grid.json")["variants"] == ["ip_adapter", "ip_adapter_full"]
    first, full = (sorted((grid / name).rglob("*.png")) for name in ("ip_adapter", "ip_adapter_full"))
    assert len(first) == len(full) == 4
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, full, strict=True))


def test_another_adapter_makes_the_artifact_stale(store):
    before = train_stamp(store, "rex", "ip_adapter")
    write_adapter(Path(store.params.config("ip_adapter").adapter), tiny_base(), seed=1)
    assert train_stamp(type(store)(store.root), "rex", "ip_adapter") != before


def test_a_check_of_the_inputs_opens_the_adapter_and_its_encoder_once(store, monkeypatch):
    folder, read = Path(store.params.config("ip_adapter").adapter), []
    original = Adapter.read
    monkeypatch.setattr(Adapter, "read", lambda *given: read.append(given) or original(*given))
    assert problems_of(store, ["rex", "cup"], ["ip_adapter"]) == [] and len(read) == 1
    rewritten(folder / ENCODER, lacking("visual_projection.weight"))
    (problem,) = problems_of(type(store)(store.root), ["rex", "cup"], ["ip_adapter"])
    assert "ip_adapter cannot be trained on 'rex': " in str(problem)
    assert f"{folder / ENCODER} lacks the weight visual_projection.weight" in str(problem)
    with pytest.raises(InputError, match="lacks the weight visual_projection.weight"):
        steps.train(store, "rex", "ip_adapter")
    assert not store.artifact("ip_adapter", "rex").exists()


def test_without_an_adapter_a_check_of_the_inputs_says_so_in_a_sentence(store):
    values = tiny_workspace.params(store.root)
    tiny_workspace.write_params(store.root, values | {"methods": {"ip_adapter": {}}, "variants": {}})
    (problem,) = problems_of(type(store)(store.root), ["rex"], ["ip_adapter"])
    assert "ip_adapter cannot be trained on 'rex': the IP-Adapter 'sd15' was trained for base models" in str(problem)


def test_a_published_adapter_that_cannot_be_fetched_says_so_at_once(base, concept, monkeypatch, tmp_path):
    """For want of a network, if only one of its files is not in the hub's cache."""
    name, known = next(iter(ADAPTERS.items()))
    snapshot = tmp_path / f"models--{known.repository.replace('/', '--')}" / "snapshots" / known.revision
    (snapshot / known.weights).parent.mkdir(parents=True)
    (snapshot / known.weights).write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: None)
    monkeypatch.setitem(ADAPTERS, name, replace(known, text_width=base.text_width))
    method = IPAdapter(Config(adapter=name), base, concept)
    with pytest.raises(InputError, match="cannot be reached from here; .* or name a folder that holds one"):
        method.check_sight(base)
