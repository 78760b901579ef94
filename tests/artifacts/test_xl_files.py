"""What is learned on Stable Diffusion XL, through diffusers' own pipeline and back, and files of other programs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.methods import method_class
from personalize_core.methods.shared.interchange import read_embedding, read_foreign
from personalize_core.methods.shared.lora_files import read_lora
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from tests.conftest import disturbed, sample_latents, stock_pipeline, tiny_base, tiny_xl, tiny_xl_parts, unpersonalized

CONCEPT = Concept("v", "<v>", "dog")
IMAGE = 2e-4  # of an image after 5 steps with a guidance of 6


@pytest.fixture(scope="module")
def xl() -> BaseModel:
    return tiny_xl()


@pytest.fixture
def pipe() -> Any:
    """A pipeline of fresh parts that have never been near this project's code."""
    parts = tiny_xl_parts()
    return stock_pipeline(parts | {"scheduler": DDIMScheduler.from_config(parts["scheduler"].config)})


def trained(name: str, base: BaseModel, **chosen: Any) -> Any:
    kind: Any = method_class(name)
    return disturbed(kind(kind.Config(**chosen), base, CONCEPT)).eval()


def imported(name: str, base: BaseModel, path: Path, **chosen: Any) -> Any:
    kind: Any = method_class(name)
    return read_foreign(kind, kind.Config(**chosen), base, CONCEPT, path).eval()


def check_same(pipe: Any, prompt: str, method: Any, base: BaseModel) -> None:
    said, start = [method.say("a photo of {} on the beach")], initial_noise(base, 0, [(0, 0)])
    theirs = pipe(
        prompt, latents=start, num_inference_steps=5, guidance_scale=6.0, output_type="latent", height=16, width=16
    ).images
    ours = sample(method, base, said, start, make_sampler("ddim", base), 5, 6.0)
    scale = ours.abs().max().item()
    torch.testing.assert_close(theirs, ours, atol=IMAGE * max(1, scale), rtol=0)
    untrained = type(method)(method.config, base, CONCEPT).eval()
    plain = sample(untrained, base, said, start, make_sampler("ddim", base), 5, 6.0)
    assert (plain - ours).abs().max() > 10 * IMAGE * scale  # else the comparison would show nothing


def load_pair(pipe: Any, folder: Path) -> None:
    """As `export` says."""
    pipe.load_textual_inversion(
        folder / "learned_embeds.safetensors", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    pipe.load_textual_inversion(
        folder / "learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )


def test_the_pair_of_embeddings_loads_as_two_textual_inversions(pipe, xl, tmp_path):
    method = trained("textual_inversion", xl)
    how = method.export(xl, tmp_path)
    assert 'load_textual_inversion("learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2' in how
    load_pair(pipe, tmp_path)
    check_same(pipe, "a photo of <v> on the beach", method, xl)


def test_the_user_interfaces_find_clip_l_and_clip_g_in_one_file(xl, tmp_path):
    method = trained("textual_inversion", xl)
    method.export(xl, tmp_path)
    pair = load_file(tmp_path / "embeddings" / "v.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in pair.items()} == {"clip_l": (1, 32), "clip_g": (1, 16)}
    assert torch.equal(torch.cat([pair["clip_l"], pair["clip_g"]], dim=1)[0], method.embedding.vector)


@pytest.mark.parametrize("path", [".", "learned_embeds.safetensors", "embeddings/v.safetensors"])
def test_an_embedding_comes_back_from_either_layout(path, xl, tmp_path):
    method = trained("textual_inversion", xl)
    method.export(xl, tmp_path)
    found = imported("textual_inversion", xl, tmp_path / path)
    assert torch.equal(found.embedding.vector, method.embedding.vector)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"emb_params": torch.ones(1, 32)},
            "an embedding is a pair: clip_l and clip_g in one file, or learned_embeds_2",
        ),
        ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 32)}, "'clip_g' is 32 wide, this base model's words"),
        ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 16)}, "is 2 vectors; a concept here is one"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(tensors, said, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=said):
        read_embedding(tmp_path / "a.safetensors", (32, 16))


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed_forward", "projections")], ids=["own", "all"])
def test_a_lora_loads_there_and_comes_back(targets, pipe, xl, tmp_path):
    method = trained("lora_dreambooth", xl, targets=targets)
    method.export(xl, tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    check_same(pipe, "a photo of sks dog on the beach", method, xl)
    again = imported("lora_dreambooth", xl, tmp_path)
    assert again.config.targets == targets
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in method.state_dict().items())


NUMBERS = {
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
}


def kohyas(base: BaseModel, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA of the U-Net by kohya's trainer for SDXL: Stability's numbers, and an alpha in each layer.

    Of this U-Net: its second resolution's only transformer is input block 3 (the first convolution is 0, the first
    resolution's residual block 1, what halves it 2); those on the way up are output blocks 0 and 1.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for transformer, number in NUMBERS.items():
        for path, layer in base.transformers[transformer].named_modules():
            if isinstance(layer, torch.nn.Linear):
                name = f"lora_unet_{number}_{path.replace('.', '_')}"
                outputs, inputs = layer.weight.shape
                tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator) / rank
                tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator)
                tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


def test_kohyas_numbered_blocks_are_read_as_the_layers_they_are_with_alpha_over_rank(xl, tmp_path):
    """By hand: W + alpha / r * up down on each linear layer of the transformers."""
    tensors = kohyas(xl, rank=3)
    save_file(tensors, tmp_path / "x.safetensors")
    method = imported("lora_dreambooth", xl, tmp_path / "x.safetensors")
    assert set(method.config.targets) == {"attention", "feed_forward", "projections"}
    assert len(method.changes) * 3 == len(tensors)
    by_hand, prompts = tiny_xl(), ["a photo of sks dog", "the desert"]
    with torch.no_grad():
        for path, weight in by_hand.unet.named_parameters():
            for transformer, number in NUMBERS.items():
                inside = path.removeprefix(f"{transformer}.").removesuffix(".weight").replace(".", "_")
                name = f"lora_unet_{number}_{inside}"
                if path.startswith(f"{transformer}.") and f"{name}.lora_up.weight" in tensors:
                    weight += 1.5 / 3 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    expected = sample_latents(unpersonalized(by_hand, CONCEPT), by_hand, prompts)
    found = sample_latents(method, xl, prompts)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_diffusers_samples_the_same_with_layers_named_as_kohya_names_those_of_its_own_paths(pipe, xl, tmp_path):
    method = trained("lora_dreambooth", xl)
    renamed = {}
    for path, change in method.changes.by_path():
        name = f"lora_unet_{path.replace('.', '_')}"
        renamed |= {f"{name}.lora_down.weight": change.A.detach(), f"{name}.lora_up.weight": change.B.detach() * 2}
        renamed[f"{name}.alpha"] = torch.tensor(len(change.A) / 2)
    save_file(renamed, tmp_path / "x.safetensors")
    again = imported("lora_dreambooth", xl, tmp_path / "x.safetensors")
    prompts = [method.say("a photo of {}")]
    torch.testing.assert_close(sample_latents(again, xl, prompts), sample_latents(method, xl, prompts))


def test_layers_of_both_text_encoders_are_read_and_not_taken_for_each_others(xl, tmp_path):
    shapes = {"lora_te1": 32, "lora_te2": 16}
    tensors = {}
    for prefix, width in shapes.items():
        name = f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", xl)
    ((_, (A, _)),), ((_, (A_2, _)),) = found.text_encoder.items(), found.text_encoder_2.items()
    assert (A.shape, A_2.shape) == ((2, 32), (2, 16)) and not found.unet
    with pytest.raises(InputError, match="changes layers of the text encoders, such as encoder.layers.0.self_attn.q_"):
        imported("lora_dreambooth", xl, tmp_path / "x.safetensors")


@pytest.mark.parametrize("part", ["te1", "te2"])
@pytest.mark.parametrize("name", ["lora_dreambooth", "dco", "personalized_residuals"])
def test_no_layer_of_a_text_encoder_is_left_out_of_a_lora(name, part, xl, tmp_path):
    trained(name, xl).export(xl, tmp_path)
    file, layer = tmp_path / "pytorch_lora_weights.safetensors", f"lora_{part}_text_model_encoder_layers_0_mlp_fc1"
    encoder: Any = xl.text_encoders["text_encoder" if part == "te1" else "text_encoder_2"]
    outputs, width = next(w for n, w in encoder.named_parameters() if n.endswith("layers.0.mlp.fc1.weight")).shape
    more = {f"{layer}.lora_down.weight": torch.ones(1, width), f"{layer}.lora_up.weight": torch.ones(outputs, 1)}
    save_file(load_file(file) | more, file)
    with pytest.raises(InputError, match=r"such as (text_model\.)?encoder\.layers\.0\.mlp\.fc1"):
        imported(name, xl, tmp_path)


@pytest.mark.parametrize("changed", [None, "text_encoder", "text_encoder_2"])
def test_a_pipeline_is_read_whole_or_refused(changed, pipe, xl, tmp_path):
    method = trained("dreambooth", xl)
    method.export(xl, tmp_path / "exported")
    pipe.save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "unet")
    (tmp_path / "exported" / "unet").rename(tmp_path / "pipeline" / "unet")
    if not changed:
        again = imported("dreambooth", xl, tmp_path / "pipeline").state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in method.state_dict().items())
        return
    file = tmp_path / "pipeline" / changed / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 if name.endswith("fc1.bias") else tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(InputError, match=f"pipeline: {changed} differ from the base model's"):
        imported("dreambooth", xl, tmp_path / "pipeline")


@pytest.mark.parametrize("zero", ["clip_l", "clip_g"])
@pytest.mark.parametrize("layout", ["one file", "two"])
def test_half_a_pair_of_zeros_is_no_embedding(layout, zero, xl, tmp_path):
    trained("textual_inversion", xl).export(xl, tmp_path)
    if layout == "two":
        file = tmp_path / {"clip_l": "learned_embeds.safetensors", "clip_g": "learned_embeds_2.safetensors"}[zero]
        tensors = {"<v>": torch.zeros_like(load_file(file)["<v>"])}
    else:
        file = tmp_path / "embeddings" / "v.safetensors"
        tensors = load_file(file)
        tensors[zero] = torch.zeros_like(tensors[zero])
    save_file(tensors, file)
    with pytest.raises(InputError, match="zero"):
        imported("textual_inversion", xl, tmp_path if layout == "two" else file)


@pytest.mark.parametrize(
    "path",
    [".", "learned_embeds.safetensors", "learned_embeds_2.safetensors", "embeddings/v.safetensors"],
)
def test_no_layout_of_a_pair_is_read_by_halves_into_stable_diffusion_1(path, xl, tmp_path):
    trained("textual_inversion", xl).export(xl, tmp_path)
    one = tiny_base()
    assert one.text_encoders.widths[0] == xl.text_encoders.widths[0]  # so that the width alone does not tell
    with pytest.raises(InputError, match="was learned for Stable Diffusion XL, whose embeddings are pairs"):
        imported("textual_inversion", one, tmp_path / path)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_of_the_other_family_is_refused_by_its_name(form, xl, tmp_path):
    """Layers that only one family has; the first that the base model lacks need not be one of them."""
    one = tiny_base()
    for base, other, mark, family in (
        (one, xl, "(up_blocks.0.attentions|transformer_blocks.1)", "was trained for Stable Diffusion XL, as "),
        (xl, one, "down_blocks.0.attentions", "was trained for Stable Diffusion 1 or 2, as "),
    ):
        trained("lora_dreambooth", other).export(other, tmp_path / "out")
        file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
        if form == "kohya":
            tensors = {}
            for name, tensor in load_file(file).items():
                layer, _, side = name.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
                end = {"A": "lora_down", "B": "lora_up"}[side]
                tensors[f"lora_unet_{layer.replace('.', '_')}.{end}.weight"] = tensor
            save_file(tensors, file)
        with pytest.raises(InputError, match=f"{family}'[^']*{mark}"):  # the dots match underscores too
            imported("lora_dreambooth", base, file)


@pytest.mark.parametrize("name", ["dreambooth", "ti_db"])
def test_a_tuned_unet_loads_there_and_comes_back(name, xl, tmp_path):
    method = trained(name, xl)
    method.export(xl, tmp_path)
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    parts = tiny_xl_parts() | {"unet": unet.eval()}
    pipe = stock_pipeline(parts | {"scheduler": DDIMScheduler.from_config(parts["scheduler"].config)})
    if name == "ti_db":
        load_pair(pipe, tmp_path)
    prompt = method.say("a photo of {} on the beach")
    check_same(pipe, prompt if name == "ti_db" else prompt.replace("<v>", "sks"), method, xl)
    again = imported(name, xl, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in method.state_dict().items())


def test_residuals_load_as_a_lora_and_come_back(pipe, xl, tmp_path):
    method = trained("personalized_residuals", xl)
    method.export(xl, tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    check_same(pipe, "a photo of sks dog on the beach", method, xl)
    again = imported("personalized_residuals", xl, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in method.state_dict().items())


def test_custom_diffusion_loads_there_and_comes_back(pipe, xl, tmp_path):
    method = trained("custom_diffusion", xl)
    method.export(xl, tmp_path)
    pipe.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    load_pair(pipe, tmp_path)
    check_same(pipe, method.say("a photo of {} on the beach"), method, xl)
    again = imported("custom_diffusion", xl, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in method.state_dict().items())


def test_a_rotation_loads_there_by_peft_and_comes_back(pipe, xl, tmp_path):
    from peft import PeftModel

    method = trained("oft", xl)
    method.export(xl, tmp_path)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "oft")
    check_same(pipe, "a photo of sks dog on the beach", method, xl)
    again, prompts = imported("oft", xl, tmp_path), [method.say("a photo of {}")]
    torch.testing.assert_close(
        sample_latents(again, xl, prompts), sample_latents(method, xl, prompts), atol=1e-3, rtol=1e-4
    )
