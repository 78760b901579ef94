"""Files of other programs are imported as they are meant, or refused in one sentence that names the file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from personalize_core import steps
from personalize_core.artifacts import proof
from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import method_class, recipe_class
from personalize_core.methods.oft.method import read_adapter
from personalize_core.methods.shared.interchange import read_embedding, read_foreign, read_network
from personalize_core.methods.shared.layer_modules import attention_projections
from personalize_core.methods.shared.lora_files import read_lora
from personalize_core.steps import result_checks
from personalize_core.steps.training import PROOF
from personalize_core.workspace.recipes import load_base
from tests import tiny_workspace
from tests.artifacts.test_export import check_same, fresh_pipeline
from tests.conftest import LAYERS, disturbed, predict, tiny_base
from tests.mutated import outcomes, put

CONCEPT = Concept("v", "<v>", "dog")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    return tiny_base()


def brought_in(name: str, base: BaseModel, path: Path) -> Any:
    kind: Any = method_class(name)
    return read_foreign(kind, recipe_class(name)(), base, CONCEPT, path).eval()


def refusal(name: str, base: BaseModel, path: Path) -> str:
    with pytest.raises(InputError) as refused:
        brought_in(name, base, path)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 1000 and str(path) in said
    return said


# -- low-rank changes -----------------------------------------------------------------------------------------


def lora(base: BaseModel, rank: int = 2) -> Tensors:
    """By the names that diffusers gives today."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, layer in attention_projections(base).items():
        tensors[f"unet.{path}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
        tensors[f"unet.{path}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator)
    return tensors


def renamed(tensors: Tensors, new: Callable[[str, str], str]) -> Tensors:
    """The same tensors by other names, from a layer's path and "A" or "B"."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, side = name.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
        found[new(layer, side)] = tensor
    return found


def oldest(layer: str, side: str) -> str:
    """As in diffusers' first releases."""
    block, _, projection = layer.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{projection}_lora.{'down' if side == 'A' else 'up'}.weight"


def kohya(tensors: Tensors, alpha: float = 2.0) -> Tensors:
    found = renamed(
        tensors,
        lambda layer, side: f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight",
    )
    return found | {f"{name.partition('.')[0]}.alpha": torch.tensor(alpha) for name in found}


def peft(folder: Path, tensors: Tensors, **about: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    inside = renamed(tensors, lambda layer, side: f"base_model.model.{layer}.lora_{side}.weight")
    save_file(inside, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | about))
    return folder


def test_a_lora_reads_the_same_by_every_name_that_programs_give_its_layers(tiny, tmp_path):
    tensors, of = lora(tiny), {"A": "down", "B": "up"}
    forms = {
        "diffusers 0.22": tensors,
        "diffusers 0.17": renamed(tensors, lambda layer, side: f"unet.{layer}.lora.{of[side]}.weight"),
        "diffusers 0.15": renamed(tensors, lambda layer, side: f"unet.{oldest(layer, side)}"),
        "diffusers 0.10": renamed(tensors, oldest),
        "kohya": kohya(tensors),
    }
    paths = [peft(tmp_path / "peft", tensors), peft(tmp_path / "parts" / "unet", tensors).parent]
    for name, form in forms.items():
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(form, paths[-1])
    for path in paths:
        found = read_lora(path, tiny)
        assert len(found.unet) == 8 * len(LAYERS) and not found.text_encoder
        for layer, (A, B) in found.unet.items():
            assert torch.equal(A, tensors[f"unet.{layer}.lora_A.weight"])
            assert torch.equal(B, tensors[f"unet.{layer}.lora_B.weight"])


def test_alpha_scales_wherever_a_program_writes_it(tiny, tmp_path):
    tensors = lora(tiny)
    save_file(kohya(tensors, alpha=6.0), tmp_path / "kohya.safetensors")
    about = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.lora_alpha": 1})
    save_file(tensors, tmp_path / "diffusers.safetensors", metadata={"lora_adapter_metadata": about})
    peft(tmp_path / "peft", tensors, lora_alpha=6)
    for path in ("kohya.safetensors", "diffusers.safetensors", "peft"):
        for layer, (_, B) in read_lora(tmp_path / path, tiny).unet.items():
            torch.testing.assert_close(B, 3 * tensors[f"unet.{layer}.lora_B.weight"])


def kohyas_default_targets(base: BaseModel, rank: int) -> Tensors:
    """As kohya's train_network.py saves a LoRA: every linear layer and 1x1 convolution of the U-Net's transformers, and
    the attention and feed-forward layers of the text encoder, each with an alpha of 1; in half precision."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for prefix, network, inside in (
        ("lora_unet", base.unet, ".attentions."),
        ("lora_te", base.text_encoders["text_encoder"], "encoder.layers."),
    ):
        for path, layer in network.named_modules():
            if inside in f".{path}" and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                outputs, inputs, *kernel = layer.weight.shape
                if prefix == "lora_te":
                    path = f"text_model.{path}"
                name = f"{prefix}_{path.replace('.', '_')}"
                down = torch.randn(rank, inputs, *kernel, generator=generator) / rank
                up = torch.randn(outputs, rank, *kernel, generator=generator)
                tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
                tensors[f"{name}.alpha"] = torch.tensor(1)  # an integer, where nothing is said of precision
    return tensors


@pytest.mark.parametrize("linear", [False, True], ids=["convolutional", "linear"])
def test_a_kohya_lora_of_its_default_targets_changes_every_weight_by_alpha_over_rank_up_down(linear, tmp_path):
    """Computed by hand: W + alpha / r * up down on each layer of the base model, U-Net and text encoder."""
    base, rank, prompts = tiny_base(linear), 3, ["a photo of <v> dog", "the desert"]
    tensors = kohyas_default_targets(base, rank)
    save_file(tensors, tmp_path / "x.safetensors")
    method = brought_in("lora_dreambooth", base, tmp_path / "x.safetensors")
    assert set(method.config.targets) == {"attention", "feed_forward", "projections", "text_encoder"}
    assert len(method.changes) == len(LAYERS) * 12 and len(method.encoder_changes) == 12
    assert len(tensors) == 3 * (len(LAYERS) * 12 + 12)
    with method.attach(base):
        context = method.condition(base, prompts)(torch.tensor([500, 500]))
        attached = predict(base, context)
    untouched = predict(base, base.encode(prompts, CONCEPT))
    changed = 0
    with torch.no_grad():
        for prefix, network in (("lora_unet_", base.unet), ("lora_te_text_model_", base.text_encoders["text_encoder"])):
            for path, parameter in network.named_parameters():
                name = prefix + path.removesuffix(".weight").replace(".", "_")
                if (down := tensors.get(f"{name}.lora_down.weight")) is not None:
                    up = tensors[f"{name}.lora_up.weight"].float()
                    parameter += (1 / rank * up.flatten(1) @ down.float().flatten(1)).view_as(parameter)
                    changed += 1
    assert changed == len(LAYERS) * 12 + 12
    by_hand = base.encode(prompts, CONCEPT)
    torch.testing.assert_close(context.hidden, by_hand.hidden, atol=1e-4, rtol=1e-4)
    expected = predict(base, by_hand)
    torch.testing.assert_close(attached, expected, atol=1e-4, rtol=1e-3)
    assert (expected - untouched).abs().max() > 0.1


def test_diffusers_samples_the_same_with_a_kohya_lora_of_its_default_targets(tmp_path):
    base = tiny_base()
    save_file(kohyas_default_targets(base, 3), tmp_path / "x.safetensors")
    method = brought_in("lora_dreambooth", base, tmp_path / "x.safetensors")
    pipe = fresh_pipeline(base)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    check_same(pipe, "a photo of sks dog on the beach", method, base)


@pytest.mark.parametrize("targets", [("feed_forward",), ("projections", "text_encoder")])
def test_the_targets_of_an_import_are_those_that_the_file_changes(targets, tiny, tmp_path):
    kind: Any = method_class("lora_dreambooth")
    method = disturbed(kind(recipe_class("lora_dreambooth")(targets=targets), tiny, CONCEPT))  # type: ignore[call-arg]
    method.export(tiny, tmp_path)
    found = brought_in("lora_dreambooth", tiny, tmp_path)
    assert found.config.targets == targets
    ours, theirs = method.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    said = refusal("personalized_residuals", tiny, tmp_path)
    assert "does not fit: it changes" in said and "this method changes proj_out alone" in said


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    "change, said",
    [
        ({f"{LAYER}.dora_scale": torch.ones(2, 2)}, "factors of DoRA"),
        ({f"{LAYER}.hada_w1_a": torch.ones(2, 2)}, "factors of LoHa"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "factors of LoKr"),
        ({f"{LAYER}.oft_blocks": torch.ones(2, 2)}, "factors of OFT"),
        ({f"{LAYER}.lora_mid.weight": torch.ones(2, 2)}, "a Tucker decomposition"),
        ({f"{LAYER}.bias": torch.ones(16)}, "no factor of a LoRA"),
        ({f"{LAYER}.lora_down.weight": torch.ones(2)}, "the factors of down_blocks.0"),
        ({f"{LAYER}.lora_down.weight": torch.ones(3, 16)}, "are 3 x 16 and 16 x 2, its weight is 16 x 16"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "alpha = nan, which should be a number"),
        ({f"{LAYER}.alpha": torch.tensor([1.0, 2.0])}, "alpha = None, which should be a number"),
        ({"lora_unet_some_layer.lora_down.weight": torch.ones(2, 2)}, "names no layer of this base model"),
        ({"lora_te2_text_model_x.lora_down.weight": torch.ones(2, 2)}, "trained for Stable Diffusion XL"),
        (
            {
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 16, 3, 3),
                "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(16, 2, 1, 1),
            },
            "a convolution of 3 x 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_lora_for_the_base_model_is_refused(change, said, tiny, tmp_path):
    save_file(kohya(lora(tiny)) | change, tmp_path / "x.safetensors")
    assert said in refusal("lora_dreambooth", tiny, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "about, said",
    [
        ('{"unet.r": 2, "unet.lora_alpha": null}', "unet.lora_alpha = None, which should be a number"),
        ('{"unet.lora_alpha": []}', "which should be a number"),
        ('{"unet.lora_alpha": true}', "which should be a number"),
        ('{"unet.use_dora": true}', "was trained with use_dora"),
        ("{", "is not JSON"),
        ("[1]", "should be a JSON object"),
    ],
)
def test_odd_metadata_of_a_lora_is_refused(about, said, tiny, tmp_path):
    save_file(lora(tiny), tmp_path / "x.safetensors", metadata={"format": "pt", "lora_adapter_metadata": about})
    assert said in refusal("lora_dreambooth", tiny, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "about, said",
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA', not LORA"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_alpha": 0}, "0"),
    ],
)
def test_an_adapter_of_pefts_that_is_no_plain_lora_is_refused(about, said, tiny, tmp_path):
    assert said in refusal("lora_dreambooth", tiny, peft(tmp_path, lora(tiny), **about))


# -- numbers --------------------------------------------------------------------------------------------------


BAD_NUMBERS = {
    "infinite or not a number": lambda tensor: tensor.index_fill(-1, torch.tensor([0]), float("nan")),
    "floating-point": lambda tensor: tensor.to(torch.int64),
    "no weight is that large": lambda tensor: tensor * 1e30,
    "all values are zero": torch.zeros_like,
}


@pytest.mark.parametrize("said", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["lora_dreambooth", "textual_inversion", "oft", "dreambooth", "custom_diffusion"])
def test_numbers_that_no_weights_have_are_refused(name, said, tiny, tmp_path):
    method: Any = disturbed(method_class(name)(recipe_class(name)(), tiny, CONCEPT))
    method.export(tiny, tmp_path)
    folder = tmp_path / "unet" if name == "dreambooth" else tmp_path
    for path in tmp_path.rglob("*.safetensors"):
        if path.parent.name != "embeddings":
            put(path, save({key: BAD_NUMBERS[said](each) for key, each in load_file(path).items() if each.numel()}))
    with pytest.raises(InputError, match=said) as refused:
        brought_in(name, tiny, folder / "oft" if name == "oft" else folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("tensor, said", [(torch.zeros(0), "is empty"), (torch.tensor(1.0), "is 1 wide")])
def test_an_embedding_of_no_use_is_refused(tensor, said, tiny, tmp_path):
    save_file({"emb_params": tensor}, tmp_path / "x.safetensors")
    assert said in refusal("textual_inversion", tiny, tmp_path / "x.safetensors")


def test_a_file_of_many_tensors_is_no_embedding_and_not_all_are_named(tiny, tmp_path):
    save_file(lora(tiny), tmp_path / "x.safetensors")
    said = refusal("textual_inversion", tiny, tmp_path / "x.safetensors")
    assert "holds 64 tensors" in said and "61 more; an embedding's file holds one" in said


def test_an_embedding_in_eight_bits_is_read(tiny, tmp_path):
    vector = torch.arange(1, tiny.text_width + 1) / 8
    save_file({"emb_params": vector.to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    found = brought_in("textual_inversion", tiny, tmp_path / "x.safetensors").embedding.vector
    assert torch.equal(found, vector.to(torch.float8_e4m3fn).float())


# -- whole networks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    tiny.unet.save_pretrained(folder)
    return folder


def a_copy(folder: Path, to: Path, name: str = "diffusion_pytorch_model.safetensors", **settings: Any) -> Path:
    """The network's folder with its weights by another name, and other settings in its config.json."""
    about = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(about | settings))
    (to / name).hardlink_to(folder / "diffusion_pytorch_model.safetensors")
    return to


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_a_network_is_read_whatever_its_file_is_called(name, tiny, unet, tmp_path):
    found, own = read_network(tiny.unet, a_copy(unet, tmp_path, name)), tiny.unet.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)


def test_all_shards_of_a_network_are_read(tiny, tmp_path):
    tiny.unet.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_network(tiny.unet, tmp_path).keys() == tiny.unet.state_dict().keys()


@pytest.mark.parametrize("outer", ["text_model.", ""])
def test_a_text_encoder_is_read_by_the_names_of_every_release_of_transformers(outer, tiny, tmp_path):
    own = {name: tensor.clone() for name, tensor in tiny.text_encoders["text_encoder"].state_dict().items()}
    saved = {f"{outer}{name}": tensor for name, tensor in own.items()}
    saved[f"{outer}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = read_network(tiny.text_encoders["text_encoder"], tmp_path)
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"layers_per_block": 100_000}, "layers_per_block = 100000, and the base model has 1"),
        ({"attention_head_dim": 4}, "attention_head_dim = 4"),  # weights of the same shapes, and other images
        ({"block_out_channels": [1 << 40] * 4}, "block_out_channels = "),
    ],
)
def test_a_network_of_another_architecture_is_refused_before_it_is_built(settings, said, tiny, unet, tmp_path):
    assert said in refusal("dreambooth", tiny, a_copy(unet, tmp_path, **settings))


@pytest.mark.parametrize("change, said", [("lacks", "lacks conv_out.bias"), ("has", "also has conv_out.more")])
def test_a_network_with_other_tensors_is_refused(change, said, tiny, unet, tmp_path):
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    bias = tensors["conv_out.bias"]
    if change == "lacks":
        del tensors["conv_out.bias"]
    else:
        tensors["conv_out.more"] = bias.clone()
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    assert said in refusal("dreambooth", tiny, tmp_path)


@pytest.mark.parametrize("name", ["dreambooth", "custom_diffusion"])
def test_a_matrix_of_zeros_among_whole_weights_is_refused(name, tiny, tmp_path):
    method: Any = disturbed(method_class(name)(recipe_class(name)(), tiny, CONCEPT))
    method.export(tiny, tmp_path)
    file = next(file for file in tmp_path.rglob("*.safetensors") if "learned_embeds" not in file.name)
    tensors = load_file(file)
    zero = next(key for key in tensors if key.endswith(("attn2.to_k.weight", "to_k_custom_diffusion.weight")))
    save_file(tensors | {zero: torch.zeros_like(tensors[zero])}, file)
    assert f"all values of {zero.replace('.processor.', '.')[:20]}" in refusal(name, tiny, tmp_path).replace("'", "")


def test_a_change_of_zeros_leaves_its_layer_as_it_is(tiny, tmp_path):
    tensors = lora(tiny)
    zero = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file(tensors | {zero: torch.zeros_like(tensors[zero])}, tmp_path / "x.safetensors")
    assert any(
        not each.B.any()
        for _, each in brought_in("lora_dreambooth", tiny, tmp_path / "x.safetensors").changes.by_path()
    )


# -- folders --------------------------------------------------------------------------------------------------


HOLDS = {  # method -> what `export` writes for it
    "textual_inversion": {"embedding"},
    "dti": {"embedding"},
    "lora_dreambooth": {"lora"},
    "dco": {"lora", "embedding"},
    "dreambooth": {"unet"},
    "ti_db": {"unet", "embedding"},
    "attn_dreambooth": {"unet", "embedding"},
    "core": {"unet", "embedding"},
    "custom_diffusion": {"processors", "embedding"},
    "class_diffusion": {"processors", "embedding"},
    "personalized_residuals": {"lora"},  # of other layers than any other's
    "oft": {"oft"},
    "peft": {"peft"},
}
READS = [name for name in HOLDS if name not in ("attn_dreambooth", "core")]


def exported(name: str, base: BaseModel, folder: Path, **chosen: Any) -> Any:
    method: Any = disturbed(method_class(name)(recipe_class(name)(**chosen), base, CONCEPT))
    method.export(base, folder)
    return method


@pytest.mark.parametrize("name", READS)
def test_what_trainers_leave_beside_their_result_changes_no_import(name, tiny, tmp_path):
    """Checkpoints, logs, embeddings of earlier steps, a pickle of the same weights, and what publishes them."""
    method = exported(name, tiny, tmp_path)
    for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*/*.safetensors")]:
        file.with_suffix(".bin").write_bytes(b"the same, as a pickle")
        earlier = tmp_path / "checkpoint-500" / file.relative_to(tmp_path)
        earlier.parent.mkdir(parents=True, exist_ok=True)
        earlier.write_bytes(b"of an earlier step")
    for more in ("checkpoint-500/optimizer.bin", "logs/events", "learned_embeds-steps-500.safetensors", "README.md"):
        (tmp_path / more).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / more).write_bytes(b"x")
    again, own = brought_in(name, tiny, tmp_path).state_dict(), method.state_dict()
    assert again.keys() == own.keys()
    if name != "oft":  # whose matrices come back skew
        assert all(torch.equal(again[key], own[key]) for key in own)


@pytest.mark.parametrize("name", HOLDS)
def test_no_import_leaves_part_of_a_folder_unread(name, tiny, tmp_path):
    exported(name, tiny, tmp_path)
    smaller = [other for other in READS if HOLDS[other] < HOLDS[name] and other != "personalized_residuals"]
    assert bool(smaller) == (len(HOLDS[name]) > 1)
    for other in smaller:
        said = refusal(other, tiny, tmp_path)
        assert "also holds" in said and "name the file, or a folder, with only what is to be read" in said


@pytest.mark.parametrize("left", ["x_emb.safetensors", "learned_embeds.bin", "text_encoder/model.safetensors"])
def test_what_was_learned_beside_a_lora_is_not_left_out(left, tiny, tmp_path):
    """The embeddings of diffusers' advanced scripts; one as a pickle; a tuned text encoder."""
    exported("lora_dreambooth", tiny, tmp_path)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_bytes(b"x")
    assert f"also holds {left.partition('/')[0]}," in refusal("lora_dreambooth", tiny, tmp_path)
    brought_in("lora_dreambooth", tiny, tmp_path / "pytorch_lora_weights.safetensors")  # named, it is what is meant


def test_residuals_without_their_trained_word_are_refused(tiny, tmp_path):
    exported("personalized_residuals", tiny, tmp_path, train_embedding=True)
    assert "also holds learned_embeds.safetensors, which this method as it is configured does not read" in refusal(
        "personalized_residuals", tiny, tmp_path
    )


# -- damaged files --------------------------------------------------------------------------------------------


def check_mutants(content: bytes, path: Path, read: Callable[[], Any], count: int = 2000) -> None:
    """Of `count` damaged copies, put at `path`, each is read or refused in a sentence that names a file there."""

    def changed(mutant: bytes) -> None:
        put(path, mutant)
        try:
            read()
        except InputError as error:
            assert path.parent.name in str(error) and "\n" not in str(error)
            raise

    accepted, refused = outcomes(content, changed, count)
    assert accepted + refused == count and refused > count // 4
    put(path, content)


def check_mutated_headers(path: Path, read: Callable[[], Any], count: int = 2000) -> None:
    """Of a safetensors file, whose numbers may be any: only what says which tensors it holds is damaged."""
    content = path.read_bytes()
    end = int.from_bytes(content[:8], "little") + 8
    check_mutants(content[:end], path, lambda: (put(path, path.read_bytes() + content[end:]), read()), count)
    put(path, content)


def guarded(imported: Callable[[Path], Any], path: Path) -> None:
    """`imported` under the guard of every import, without the method that takes milliseconds to build."""

    class Reader:
        @staticmethod
        def imported(config: Any, base: Any, concept: Concept, path: Path) -> torch.nn.Module:
            imported(path)
            return torch.nn.Linear(1, 1)

    reader: Any = Reader
    read_foreign(reader, None, None, CONCEPT, path)  # type: ignore[arg-type]


def test_damaged_embeddings_are_read_or_refused(tiny, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"emb_params": torch.randn(1, tiny.text_width)}, path)
    check_mutants(path.read_bytes(), path, lambda: guarded(lambda file: read_embedding(file, [tiny.text_width]), path))


def test_damaged_loras_are_read_or_refused(tiny, tmp_path):
    path, two_layers = tmp_path / "x.safetensors", dict(list(lora(tiny).items())[:4])
    encoder = tiny.text_encoders["text_encoder"].encoder.layers[0]
    small: Any = SimpleNamespace(unet=torch.nn.Module(), text_encoders={"text_encoder": encoder})
    small.unet.down_blocks = tiny.unet.down_blocks[:1]  # the names of whose layers take less time to list
    save_file(kohya(two_layers), path, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    check_mutated_headers(path, lambda: guarded(lambda file: read_lora(file, small), path))
    folder = peft(tmp_path / "peft", two_layers)
    about = folder / "adapter_config.json"
    check_mutants(about.read_bytes(), about, lambda: guarded(lambda file: read_lora(file, small), folder), 400)


def test_damaged_rotations_are_read_or_refused(tiny, tmp_path):
    disturbed(method_class("oft")(recipe_class("oft")(), tiny, CONCEPT)).export(tiny, tmp_path)
    folder = tmp_path / "oft"
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[:2]), folder / "adapter_model.safetensors")
    check_mutated_headers(folder / "adapter_model.safetensors", lambda: guarded(read_adapter, folder))
    check_mutants(
        (folder / "adapter_config.json").read_bytes(),
        folder / "adapter_config.json",
        lambda: brought_in("oft", tiny, folder),
        200,
    )


def test_damaged_networks_are_read_or_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"layers_per_block": 2, "attention_head_dim": 2, "act_fn": "silu"})
    )
    save_file({"conv_out.weight": torch.ones(4, 16, 3, 3), "conv_out.bias": torch.ones(4)}, tmp_path / "x.safetensors")

    def read() -> None:
        guarded(lambda folder: read_network(tiny.unet, folder), tmp_path)

    check_mutated_headers(tmp_path / "x.safetensors", read)
    check_mutants((tmp_path / "config.json").read_bytes(), tmp_path / "config.json", read, 400)


def test_damaged_attention_processors_are_read_or_refused(tiny, tmp_path):
    method: Any = disturbed(method_class("custom_diffusion")(recipe_class("custom_diffusion")(), tiny, CONCEPT))
    method.export(tiny, tmp_path)
    file = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    save_file(dict(list(load_file(file).items())[-2:]), file)
    check_mutated_headers(file, lambda: brought_in("custom_diffusion", tiny, tmp_path))


# -- pickles --------------------------------------------------------------------------------------------------


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["textual_inversion", "lora_dreambooth", "dreambooth", "oft", "custom_diffusion"])
@pytest.mark.parametrize("file", ["x.safetensors", "x.bin", "x.pt", "diffusion_pytorch_model.bin", "adapter_model.bin"])
def test_no_import_runs_a_pickle(name, file, tiny, tmp_path):
    folder = tmp_path / "from_elsewhere"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text('{"peft_type": "OFT", "r": 2}')
    (folder / file).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for path in (folder, folder / file):
        with pytest.raises(InputError, match="from_elsewhere"):
            brought_in(name, tiny, path)
    assert not (tmp_path / "ran").exists()


# -- the workspace --------------------------------------------------------------------------------------------


def an_embedding(store: Any, path: Path) -> Path:
    width = load_base(store).text_width
    save_file({"emb_params": torch.randn(1, width, generator=torch.Generator().manual_seed(0))}, path)
    return path


def test_what_is_imported_is_proved_as_what_is_trained(tmp_path):
    store = tiny_workspace.make(tmp_path)
    report = steps.import_artifact(store, "rex", "textual_inversion", an_embedding(store, tmp_path / "x.safetensors"))
    assert report.metrics["restored_samples_otherwise_by"] == 0.0
    assert json.loads((report.path / PROOF).read_text())["identical"]
    gates = {gate.name: gate for gate in result_checks.artifact(store, "rex", "textual_inversion")}
    assert gates["artifact_restores"].passed and "a fresh process sampled" in gates["artifact_restores"].said
    (report.path / PROOF).unlink()
    restores = result_checks.artifact(store, "rex", "textual_inversion")[-1]
    assert not restores.passed and not restores.serious and "import it again" in restores.said


def test_an_import_that_the_proof_refuses_leaves_no_artifact(tmp_path, monkeypatch):
    store = tiny_workspace.make(tmp_path)
    path, sampled = an_embedding(store, tmp_path / "x.safetensors"), proof.sampled_latents
    monkeypatch.setattr(proof, "sampled_latents", lambda *given: sampled(*given) * float("nan"))
    with pytest.raises(InputError, match="x.safetensors was read, but with it .* samples values that are infinite"):
        steps.import_artifact(store, "rex", "textual_inversion", path)
    given = iter([1.0, 2.0])
    monkeypatch.setattr(proof, "sampled_latents", lambda *what: sampled(*what) * next(given))
    with pytest.raises(proof.ProofFailed, match="samples something else"):
        steps.import_artifact(store, "rex", "textual_inversion", path)
    assert not store.artifact("textual_inversion", "rex").exists()


def test_nobody_is_told_to_remove_an_artifact_for_a_file_that_is_refused(tmp_path, monkeypatch):
    store = tiny_workspace.make(tmp_path)
    good = an_embedding(store, tmp_path / "good.safetensors")
    folder = steps.import_artifact(store, "rex", "textual_inversion", good).path
    (damaged := tmp_path / "damaged.safetensors").write_bytes(good.read_bytes()[:-9])
    save_file({"emb_params": torch.ones(1, 3)}, other := tmp_path / "other.safetensors")
    for path, problem in [(damaged, "damaged"), (other, "base model")]:
        with pytest.raises(InputError, match=problem) as refused:
            steps.import_artifact(store, "rex", "textual_inversion", path)
        assert f"remove {folder}" not in str(refused.value)
    with monkeypatch.context() as patch:
        sampled = proof.sampled_latents
        patch.setattr(proof, "sampled_latents", lambda *given: sampled(*given) * float("nan"))
        with pytest.raises(InputError, match="infinite or not a number"):
            steps.import_artifact(store, "rex", "textual_inversion", good)
    with pytest.raises(InputError, match=f"remove {folder}, or move it out of {folder.parent}, and import again"):
        steps.import_artifact(store, "rex", "textual_inversion", good)
    folder.rename(tmp_path / "kept")
    assert steps.import_artifact(store, "rex", "textual_inversion", good).path == folder
