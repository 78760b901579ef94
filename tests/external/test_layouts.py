"""Each tool's layout, as the tool's own code writes it: files, prompts, seeds, what is left out and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers.utils.hub_utils import MODEL_CARD_TEMPLATE_PATH
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.external.layouts import read_listing
from personalize_core.external.mentions import Mentions
from personalize_core.sampling.grid import image_name
from tests.external.folders_of_images import put_image, put_text, refusal, rows


def names(listing) -> list[str]:
    return [image.file.as_posix() for image in listing.images]


# PEFT: run.py writes sample-images/results/EXPERIMENT_NN.png, numbered from 1, with the seed + 100,000 + number, and
# utils.py writes results/EXPERIMENT.json.


def put_peft(root: Path, experiment: str, seed: int = 0, images: int = 3) -> Path:
    config = {
        "model_id": "black-forest-labs/FLUX.2-klein-base-4B",
        "seed": seed,
        "sample_image_prompts": ["a photo of sks cat", "sks cat at the beach", "a photo of an orange cat"],
    }
    run = {"experiment_name": experiment.replace("--", "/"), "train_config": config, "error_msg": ""}
    put_text(
        root / "results" / f"{experiment}.json", json.dumps({"run_info": run, "train_info": {"status": "success"}})
    )
    for number in range(1, images + 1):
        put_image(root / "sample-images" / "results" / f"{experiment}_{number:02d}.png")
    return root


def test_peft_samples(tmp_path):
    put_peft(tmp_path, "lora--flux2-klein-default", seed=7)
    listing = read_listing(tmp_path)
    assert rows(listing) == [
        ("sample-images/results/lora--flux2-klein-default_01.png", "a photo of sks cat", 100_008),
        ("sample-images/results/lora--flux2-klein-default_02.png", "sks cat at the beach", 100_009),
        ("sample-images/results/lora--flux2-klein-default_03.png", "a photo of an orange cat", 100_010),
    ]
    assert (listing.layout, listing.base_model) == ("peft", "black-forest-labs/FLUX.2-klein-base-4B")
    put_peft(tmp_path, "oft--flux2-klein-default", images=2)
    message = refusal(tmp_path)
    assert "method: lora--flux2-klein-default and oft--flux2-klein-default" in message
    assert "there are lora--" in refusal(tmp_path, method="dora--x")
    inner = tmp_path / "sample-images" / "results"
    for folder, results in ((tmp_path, {}), (inner, {}), (inner, {"results": str(tmp_path / "results")})):
        listing = read_listing(folder, options={"method": "oft--flux2-klein-default", **results})
        assert [seed for _, _, seed in rows(listing)] == [100_001, 100_002]
        assert listing.left_out == (("oft--flux2-klein-default_03.png", "is not there"),)
    put_image(inner / "oft--flux2-klein-default_04.png")
    assert "_04.png' has no prompt" in refusal(tmp_path, method="oft--flux2-klein-default")
    os.remove(tmp_path / "results" / "oft--flux2-klein-default.json")
    assert "oft--flux2-klein-default.json does not exist" in refusal(tmp_path, method="oft--flux2-klein-default")


@pytest.mark.parametrize(("key", "value"), [("sample_image_prompts", "x"), ("seed", "0"), ("seed", None)])
def test_peft_results_without_prompts_or_seed_are_refused(tmp_path, key, value):
    path = put_peft(tmp_path, "lora--a") / "results" / "lora--a.json"
    written = json.loads(path.read_text())
    written["run_info"]["train_config"][key] = value
    put_text(path, json.dumps(written))
    assert f"run_info.train_config.{key}" in refusal(tmp_path)


# ai-toolkit: BaseSDTrainProcess.py writes samples/[time]__[step, nine digits]_[count].jpg, and config.yaml.


def put_ai_toolkit(root: Path, sample: dict[str, Any], steps: tuple[int, ...] = (0, 250), count: int = 2) -> Path:
    process = {
        "type": "sd_trainer",
        "trigger_word": "p3r5on",
        "sample": {"sampler": "flowmatch", "sample_every": 250, **sample},
        "model": {"name_or_path": "black-forest-labs/FLUX.1-dev"},
    }
    put_text(root / "config.yaml", yaml.dump({"job": "extension", "config": {"name": "x", "process": [process]}}))
    for step in steps:
        for index in range(count):
            put_image(root / "samples" / f"{1_712_345_678_901 + 1000 * step + index}__{step:09d}_{index}.jpg")
    return root


def test_ai_toolkit_samples(tmp_path):
    sample = {"prompts": ["a [trigger] dog --w 512 --seed 9", "[trigger] in snow"], "seed": 42, "walk_seed": True}
    put_ai_toolkit(tmp_path, sample)
    listing = read_listing(tmp_path)
    assert rows(listing) == [
        ("samples/1712345928901__000000250_0.jpg", "a p3r5on dog", 9),
        ("samples/1712345928902__000000250_1.jpg", "p3r5on in snow", 43),
    ]
    assert (listing.layout, listing.base_model) == ("ai-toolkit", "black-forest-labs/FLUX.1-dev")
    first = read_listing(tmp_path / "samples", options={"step": "0"})  # the configuration lies one folder above
    assert [name[:25] for name in names(first)] == ["1712345678901__000000000_", "1712345678902__000000000_"]
    assert "has no step '100'; there are 0 and 250" in refusal(tmp_path, step="100")
    again = put_image(tmp_path / "samples" / "1812345928902__000000250_1.jpg")
    listing = read_listing(tmp_path)
    assert listing.images[1].file.name == again.name
    assert listing.left_out == (("samples/1712345928902__000000250_1.jpg", "was made once more later"),)
    put_image(tmp_path / "samples" / "1812345928903__000000250_2.jpg")
    assert "is of prompt 2, and" in refusal(tmp_path)


def test_ai_toolkit_seeds_of_samples(tmp_path):
    """A sample's own seed holds for those after it; without any, all have the seed 0, and -1 is a random one."""
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"}, {"prompt": "d --d -1"}]
    put_ai_toolkit(tmp_path, {"samples": samples}, count=4)
    assert [seed for _, _, seed in rows(read_listing(tmp_path))] == [0, 5, 5, None]
    put_ai_toolkit(tmp_path, {"prompts": ["a", "b"], "seed": -1}, count=2)
    os.remove(tmp_path / "samples" / "1712345928903__000000250_2.jpg")
    os.remove(tmp_path / "samples" / "1712345928904__000000250_3.jpg")
    assert [seed for _, _, seed in rows(read_listing(tmp_path))] == [None, None]


def test_ai_toolkit_prompts_from_elsewhere(tmp_path):
    put_ai_toolkit(tmp_path / "run", {"prompts": "a dog"})
    assert "holds no prompts under config.process[0].sample" in refusal(tmp_path / "run")
    put_ai_toolkit(tmp_path / "run", {"prompts": []})
    assert "holds no prompts under config.process[0].sample" in refusal(tmp_path / "run")
    os.remove(tmp_path / "run" / "config.yaml")
    assert "has no config.yaml" in refusal(tmp_path / "run")
    listed = put_text(tmp_path / "list.txt", "a dog\na cat --seed 3\n")
    assert [row[1:] for row in rows(read_listing(tmp_path / "run", options={"prompts": str(listed)}))] == [
        ("a dog", None),
        ("a cat", 3),
    ]


# kohya: train_util.py writes sample/[output_name_](eEPOCH|STEP)_INDEX_TIME[_SEED].png; load_prompts reads the prompts.


def put_kohya(root: Path, step: str, time: int, run: str = "rex_", seeds: tuple[str, ...] = ("_42", "")) -> None:
    for index, seed in enumerate(seeds):
        put_image(root / "sample" / f"{run}{step}_{index:02d}_{20261129074500 + time}{seed}.png")


def test_kohya_samples(tmp_path):
    put_kohya(tmp_path, "000500", 1)
    put_kohya(tmp_path, "e000001", 2)
    prompts = "# two prompts\nsks dog on a beach --n low quality --w 512 --d 42 --s 28\n\nsks dog -- in snow\n"
    put_text(tmp_path / "sample" / "prompt.txt", prompts)
    expected = [("sks dog on a beach", 42), ("sks dog", None)]
    for folder in (tmp_path, tmp_path / "sample"):
        listing = read_listing(folder)
        assert [row[1:] for row in rows(listing)] == expected
        assert listing.images[0].file.name == "rex_e000001_00_20261129074502_42.png" and listing.layout == "kohya"
    assert read_listing(tmp_path, options={"step": "000500"}).images[0].file.name.startswith("rex_000500_00_")
    assert "has no step '500'; there are 000500 and e000001" in refusal(tmp_path, step="500")
    put_kohya(tmp_path, "e000001", 9)
    listing = read_listing(tmp_path)
    assert listing.images[1].file.name == "rex_e000001_01_20261129074509.png"
    assert ("sample/rex_e000001_01_20261129074502.png", "was made once more later") in listing.left_out
    put_kohya(tmp_path, "000500", 5, run="")
    assert "choose one by the option method" in refusal(tmp_path)
    assert len(read_listing(tmp_path, options={"method": "rex"}).images) == 2


def test_kohya_names_of_older_versions(tmp_path):
    put_image(tmp_path / "rex_20230901074501_e000010_00_42.png")
    put_image(tmp_path / "rex_20230901074502_e000010_01.png")
    put_text(tmp_path / "prompt.txt", "a dog --d 42\na cat\n")
    assert rows(read_listing(tmp_path, options={"step": "e000010", "method": "rex"})) == [
        ("rex_20230901074501_e000010_00_42.png", "a dog", 42),
        ("rex_20230901074502_e000010_01.png", "a cat", None),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '[{"prompt": "a dog", "seed": 42}, "a cat --s 20"]'),
        (
            "p.toml",
            '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\nseed = 42\n'
            '[[prompt.subset]]\nprompt = "a cat"\n',
        ),
        ("p.txt", "a dog --d 42\r\na cat --w 512\r\n"),
    ],
)
def test_kohya_prompt_files(tmp_path, name, text):
    put_kohya(tmp_path, "000500", 1)
    assert "has no prompt.txt" in refusal(tmp_path)
    options = {"prompts": str(put_text(tmp_path / "configs" / name, text))}
    assert [row[1:] for row in rows(read_listing(tmp_path, options=options))] == [("a dog", 42), ("a cat", None)]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.json", "{}", "holds no prompt"),
        ("p.json", "[1, 2]", "prompt 0 should be a text"),
        ("p.toml", "prompt", "is not TOML"),
        ("p.toml", "", "holds no prompt"),
        ("p.toml", f"seed = {'9' * 5000}", "is not TOML"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.txt", "one\n", "is of prompt 1, and"),
        ("p.json", '["", "two"]', "the prompt is empty"),
    ],
)
def test_kohya_prompt_files_that_are_wrong(tmp_path, name, text, says):
    put_kohya(tmp_path, "000500", 1)
    assert says in refusal(tmp_path, prompts=str(put_text(tmp_path / name, text)))


# SimpleTuner: validation.py writes validation_images/step_STEP_SHORTNAME_INDEX_WIDTHxHEIGHT.png.


def test_simpletuner_validation_images(tmp_path):
    for step in (100, 1000):
        for name in ("unconditional_0_8x8", "beach_0_8x8", "red_dog_2_0_8x8", "validation_0_8x8"):
            put_image(tmp_path / "validation_images" / f"step_{step}_{name}.png")
    library = {"beach": "sks dog on a beach", "red_dog_2": {"prompt": "a red sks dog", "adapter_strength": 0.5}}
    assert "has no user_prompt_library.json" in refusal(tmp_path)
    path = put_text(tmp_path / "user_prompt_library.json", json.dumps(library))
    listing = read_listing(tmp_path)
    assert rows(listing) == [
        ("validation_images/step_1000_beach_0_8x8.png", "sks dog on a beach", None),
        ("validation_images/step_1000_red_dog_2_0_8x8.png", "a red sks dog", None),
    ]
    assert listing.layout == "simpletuner"
    assert listing.left_out == (
        ("validation_images/step_1000_unconditional_0_8x8.png", "has an empty prompt"),
        ("validation_images/step_1000_validation_0_8x8.png", f"has no prompt in {path}"),
    )
    assert names(read_listing(tmp_path / "validation_images", options={"step": "100"}))[0] == "step_100_beach_0_8x8.png"
    assert "there are 100 and 1000" in refusal(tmp_path, step="1")
    config = put_text(tmp_path / "config.json", json.dumps({"--validation_prompt": "sks dog", "--seed": 42}))
    assert [row[1] for row in rows(read_listing(tmp_path, options={"prompts": str(config)}))] == ["sks dog"]
    put_text(path, '{"beach": 3}')
    assert "'beach' should be a prompt" in refusal(tmp_path)


def test_simpletuner_images_beside_the_base_models_are_left_out(tmp_path):
    """Older versions leave the index out; a benchmark of the base model is put left of the image, 5 pixels between."""
    Image.new("RGB", (2 * 16 + 5, 16)).save(put_image(tmp_path / "step_10_dog_2_16x16.png"))
    Image.new("RGB", (16, 16)).save(put_image(tmp_path / "step_10_cat_16.png"))
    put_text(tmp_path / "user_prompt_library.json", '{"dog_2": "a dog", "cat": "a cat"}')
    listing = read_listing(tmp_path)
    assert rows(listing) == [("step_10_cat_16.png", "a cat", None)]
    assert listing.left_out == (("step_10_dog_2_16x16.png", "holds several images side by side"),)


# diffusers: save_model_card of the training scripts writes image_INDEX.png and README.md.


def put_diffusers(folder: Path, widget: bool, prompt: str = "A photo of sks dog in a bucket", images: int = 2) -> Path:
    """The card is made by the library that the scripts call."""
    for index in range(images):
        put_image(folder / f"image_{index}.png")
    entries = [{"text": prompt, "output": {"url": f"image_{index}.png"}} for index in range(images)]
    data = ModelCardData(
        license="other",
        library_name="diffusers",
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        instance_prompt="a photo of sks dog",
        widget=entries if widget else None,
    )
    card = ModelCard.from_template(data, template_path=str(MODEL_CARD_TEMPLATE_PATH), model_description="# SDXL LoRA")
    card.save(folder / "README.md")
    return folder


def test_diffusers_validation_images(tmp_path):
    put_diffusers(tmp_path, widget=True, images=11)
    listing = read_listing(tmp_path)
    assert rows(listing) == [(f"image_{index}.png", "A photo of sks dog in a bucket", None) for index in range(11)]
    assert (listing.layout, listing.base_model) == ("diffusers", "stabilityai/stable-diffusion-xl-base-1.0")


def test_diffusers_cards_that_do_not_say_the_prompt(tmp_path):
    """The scripts for Stable Diffusion list no prompts; those for SDXL write a space where there is none."""
    for folder in (put_diffusers(tmp_path / "a", widget=False), put_diffusers(tmp_path / "b", widget=True, prompt=" ")):
        assert "does not say the prompt of image_0.png" in refusal(folder)
        one = put_text(tmp_path / "one.txt", "sks dog\n")
        assert [row[1] for row in rows(read_listing(folder, options={"prompts": str(one)}))] == ["sks dog", "sks dog"]
        each = put_text(tmp_path / "each.txt", "sks dog\nsks dog in snow\n")
        assert read_listing(folder, options={"prompts": str(each)}).images[1].prompt == "sks dog in snow"
        three = put_text(tmp_path / "three.txt", "a\nb\nc\n")
        assert "holds 3 prompts for 2 images" in refusal(folder, prompts=str(three))
    put_text(tmp_path / "a" / "README.md", "\n---\nbase_model: &x y\n---\n")
    assert "anchors and aliases" in refusal(tmp_path / "a")


# DreamBench++: generate_images.py writes METHOD/{src_image,text,tgt_image}/CONCEPT/PROMPT_IMAGE.{jpg,txt}.


def put_dreambench(method: Path, concept: str, prompts: list[str]) -> None:
    put_text(method / "negative_prompt.txt", "")
    for index, prompt in enumerate(prompts):
        put_image(method / "src_image" / concept / f"{index}_0.jpg")
        put_image(method / "tgt_image" / concept / f"{index}_0.jpg")
        put_text(method / "text" / concept / f"{index}_0.txt", prompt)


def test_dreambench_plus_results(tmp_path):
    method = tmp_path / "dreambooth_sd_gs7_5_step100_seed42_torch_float16"
    put_dreambench(method, "live_subject_animal_00_kitten", ["A kitten on a beach.", "A kitten\nas a statue. "])
    prefix = "tgt_image/live_subject_animal_00_kitten"
    assert rows(read_listing(method)) == [
        (f"{prefix}/0_0.jpg", "A kitten on a beach.", None),
        (f"{prefix}/1_0.jpg", "A kitten as a statue.", None),
    ]
    assert names(read_listing(tmp_path))[0] == f"{method.name}/{prefix}/0_0.jpg"
    put_dreambench(method, "object_00_mug", ["A mug."])
    assert "option concept: live_subject_animal_00_kitten and object_00_mug" in refusal(tmp_path)
    put_dreambench(tmp_path / "emu2", "object_00_mug", ["A mug."])
    assert "option method: dreambooth_sd_gs7_5_step100_seed42_torch_float16 and emu2" in refusal(tmp_path)
    options = {"method": method.name, "concept": "object_00_mug"}
    assert names(read_listing(tmp_path, options=options)) == [f"{method.name}/tgt_image/object_00_mug/0_0.jpg"]
    os.remove(method / "text" / "object_00_mug" / "0_0.txt")
    assert "holds no image that can be scored" in refusal(tmp_path, **options)
    assert "holds no tgt_image and text" in refusal(method / "text", "dreambench++")


# CustomConcept101: evaluate.py takes FOLDER/samples/NAME.png and FOLDER/prompts.json.


def put_customconcept101(root: Path, prompts: dict[str, str]) -> Path:
    for stem in prompts:
        put_image(root / "samples" / f"{stem}.png")
    put_text(root / "prompts.json", json.dumps(prompts))
    return root


def test_customconcept101_results(tmp_path):
    put_customconcept101(tmp_path / "dog", {"00000": "photo of a <new1> dog", "00001": "<new1> dog in snow"})
    listing = read_listing(tmp_path / "dog")
    assert rows(listing) == [
        ("samples/00000.png", "photo of a <new1> dog", None),
        ("samples/00001.png", "<new1> dog in snow", None),
    ]
    put_image(tmp_path / "dog" / "samples" / "grid.png")
    assert read_listing(tmp_path).left_out == (("dog/samples/grid.png", "is not named in prompts.json"),)
    put_customconcept101(tmp_path / "cat", {"a": "a cat"})
    assert "option concept: cat and dog" in refusal(tmp_path)
    assert names(read_listing(tmp_path, options={"concept": "cat"})) == ["cat/samples/a.png"]
    put_text(tmp_path / "cat" / "prompts.json", '{"a": "a cat", "gone": "a cat", "../b": "x"}')
    assert "leads out of the folder" in refusal(tmp_path / "cat")
    put_text(tmp_path / "cat" / "prompts.json", '{"a": "a cat", "gone": "a cat"}')
    assert "lacks 1 of the 2 images" in refusal(tmp_path / "cat")
    put_text(tmp_path / "cat" / "prompts.json", '["a"]')
    assert "should hold a JSON object of texts" in refusal(tmp_path / "cat")


# ComfyUI: SaveImage writes PREFIX_NUMBER_.png with the graph in the text chunk `prompt`.


def graph(prompt: str = "sks dog on a beach", seed: Any = 8566257, prefix: str = "ComfyUI") -> dict[str, Any]:
    """The default workflow in the form of the API, as in script_examples/basic_api_example.py."""
    sampler = {"cfg": 8, "denoise": 1, "latent_image": ["5", 0], "model": ["4", 0], "negative": ["7", 0], "steps": 20}
    return {
        "3": {"class_type": "KSampler", "inputs": {**sampler, "positive": ["6", 0], "seed": seed}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 512, "width": 512}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": prompt}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "bad hands"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix, "images": ["8", 0]}},
    }


def put_comfyui(folder: Path, number: int, nodes: dict[str, Any], prefix: str = "ComfyUI") -> Path:
    texts = {"prompt": json.dumps(nodes), "workflow": json.dumps({"nodes": []})}
    return put_image(folder / f"{prefix}_{number:05}_.png", texts)


def test_comfyui_output(tmp_path):
    put_comfyui(tmp_path, 1, graph())
    put_comfyui(tmp_path, 2, graph("sks dog\nin snow", seed=2**64 - 1))
    put_image(tmp_path / "pasted.png")
    put_image(tmp_path / "photo.jpg")
    listing = read_listing(tmp_path)
    assert rows(listing) == [
        ("ComfyUI_00001_.png", "sks dog on a beach", 8566257),
        ("ComfyUI_00002_.png", "sks dog in snow", 2**64 - 1),
    ]
    assert (listing.layout, listing.base_model) == ("comfyui", "v1-5-pruned-emaonly.safetensors")
    assert listing.left_out == (
        ("pasted.png", "has no graph of ComfyUI in its metadata"),
        ("photo.jpg", "is not a PNG that can be read"),
    )
    put_comfyui(tmp_path, 1, graph(), prefix="lora_b")
    assert "two images of the prompt 'sks dog on a beach' with the seed 8566257" in refusal(tmp_path)
    assert names(read_listing(tmp_path, options={"prefix": "lora_b"})) == ["lora_b_00001_.png"]
    assert "there are ComfyUI and lora_b" in refusal(tmp_path, prefix="lora_c")


def test_comfyui_graph_for_flux(tmp_path):
    """The example workflow of ComfyUI for FLUX: noise and guider go into the sampler, and a text comes over a link."""
    nodes = {
        "13": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["25", 0], "guider": ["22", 0], "sampler": ["16", 0], "latent_image": ["27", 0]},
        },
        "22": {"class_type": "BasicGuider", "inputs": {"model": ["12", 0], "conditioning": ["26", 0]}},
        "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["40", 0], "clip": ["11", 0]}},
        "40": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a sks dog"}},
        "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": ["41", 0]}},
        "41": {"class_type": "PrimitiveInt", "inputs": {"value": 219670278747233}},
        "27": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
        "12": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "11": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "t5xxl_fp16.safetensors", "type": "flux"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["10", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
        "16": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }
    put_comfyui(tmp_path, 1, nodes)
    listing = read_listing(tmp_path)
    assert rows(listing) == [("ComfyUI_00001_.png", "a sks dog", 219670278747233)]
    assert listing.base_model == "flux1-dev.safetensors"


def test_comfyui_conditioning_that_passes_a_node_with_two_outputs(tmp_path):
    nodes = graph()
    nodes["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["20", 1]}
    nodes["20"] = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0], "strength": 1.0, "image": ["8", 0]},
    }
    put_comfyui(tmp_path, 1, nodes)
    assert rows(read_listing(tmp_path))[0][1] == "sks dog on a beach"


def test_comfyui_images_of_one_batch_have_no_seed_of_their_own(tmp_path):
    nodes = graph()
    nodes["5"]["inputs"]["batch_size"] = 4
    for number in range(1, 5):
        put_comfyui(tmp_path, number, nodes)
    assert [seed for _, _, seed in rows(read_listing(tmp_path))] == [None] * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"6": {"inputs": {"text": ""}}}, "has no prompt in its graph"),
        ({"6": {"inputs": {"text_g": "a dog", "text_l": "a cat"}}}, "is made of 2 texts: ['a cat', 'a dog']"),
        ({"6": {"inputs": {"conditioning": ["6", 0]}}}, "has no prompt in its graph"),
        ({"3": {"inputs": {"samples": ["3", 0]}}}, "has no sampler in its graph"),
        ({"9": {"inputs": {}}}, "has 0 nodes in its graph that may have saved it"),
        ({"10": {"inputs": {"filename_prefix": "ComfyUI"}}}, "has 2 nodes in its graph"),
        ({"3": {"inputs": {"positive": ["6", 0], "seed": 2**64}}}, "the seed is 18446744073709551616"),
    ],
)
def test_comfyui_graphs_that_do_not_say_it(tmp_path, change, says):
    put_comfyui(tmp_path, 1, graph("good"))
    put_comfyui(tmp_path, 2, {**graph(seed=3), **change})
    listing = read_listing(tmp_path)
    assert names(listing) == ["ComfyUI_00001_.png"]
    assert len(listing.left_out) == 1 and says in listing.left_out[0][1]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"1": 3}', '{"a": {"inputs": []}}', "[" * 9999, '{"1": {"inputs": {"x": ["1", 0]}}}']
)
def test_comfyui_metadata_that_are_damaged(tmp_path, text):
    put_comfyui(tmp_path, 1, graph())
    put_image(tmp_path / "ComfyUI_00002_.png", {"prompt": text})
    assert len(read_listing(tmp_path).left_out) == 1
    os.remove(tmp_path / "ComfyUI_00001_.png")
    assert "holds no image that can be scored" in refusal(tmp_path, "comfyui")


def test_comfyui_seeds_that_come_from_nowhere(tmp_path):
    nodes = graph(seed=["30", 0])
    nodes["30"] = {"class_type": "Loop", "inputs": {"seed": ["30", 0]}}
    put_comfyui(tmp_path, 1, nodes)
    assert rows(read_listing(tmp_path))[0][2] is None


# Another workspace: sampling/grid.py writes VARIANT/PROMPT_IMAGE.png and grid.json.


def put_grid(root: Path, *variants: str, images: int = 2) -> Path:
    about = {"variants": list(variants), "templates": ["a photo of a {}", "a {} on the beach"], "base_model": "sd-1.5"}
    put_text(root / "grid.json", json.dumps(about | {"images_per_prompt": images, "concept": "rex", "method": "oft"}))
    for variant in variants:
        for prompt in range(2):
            for image in range(images):
                put_image(root / image_name(variant, prompt, image))
    return root


def test_a_grid_of_another_workspace(tmp_path):
    listing = read_listing(put_grid(tmp_path, "oft"))
    assert rows(listing) == [
        ("oft/00_00.png", "a photo of a {}", None),
        ("oft/00_01.png", "a photo of a {}", None),
        ("oft/01_00.png", "a {} on the beach", None),
        ("oft/01_01.png", "a {} on the beach", None),
    ]
    assert (listing.layout, listing.base_model) == ("personalize", "sd-1.5")
    assert Mentions(Concept("rex", "<rex>", "dog")).template(listing.images[2].prompt) == "a {} on the beach"
    (tmp_path / "oft" / "01_00.png").unlink()
    assert read_listing(tmp_path).left_out == (("oft/01_00.png", "is not there"),)


def test_of_a_grid_with_several_variants_one_is_chosen_and_what_leads_out_is_refused(tmp_path):
    put_grid(tmp_path, "oft", "oft_lag")
    assert "choose one by the option variant: oft and oft_lag" in refusal(tmp_path)
    chosen = read_listing(tmp_path, options={"variant": "oft_lag"})
    assert names(chosen)[0] == "oft_lag/00_00.png"
    for damage, says in (
        ({"variants": ["../oft"]}, "leads out of the folder"),
        ({"variants": ["gone"]}, "holds no folder of images of gone"),
        ({"variants": []}, "variants is [], and should be a list of texts"),
        ({"templates": [1]}, "templates is [1], and should be a list of texts"),
        ({"images_per_prompt": 10**9}, "should be a number of images"),
        ({"images_per_prompt": True}, "should be a number of images"),
    ):
        about = json.loads((put_grid(tmp_path / "x", "oft") / "grid.json").read_text())
        put_text(tmp_path / "x" / "grid.json", json.dumps(about | damage))
        assert says in refusal(tmp_path / "x", "personalize")


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("peft", "no image named EXPERIMENT_NN"),
        ("ai-toolkit", "no image named MILLISECONDS__STEP_INDEX"),
        ("kohya", "no image named NAME_STEP_INDEX_TIME"),
        ("simpletuner", "no image named step_STEP_SHORTNAME"),
        ("diffusers", "no image named image_INDEX"),
        ("dreambench++", "holds no tgt_image and text"),
        ("customconcept101", "holds no samples and prompts.json"),
        ("comfyui", "holds no image that can be scored"),
        ("personalize", "grid.json does not exist"),
    ],
)
def test_a_folder_without_a_layouts_images_is_refused(tmp_path, layout, says):
    put_image(tmp_path / "a.png")
    assert says in refusal(tmp_path, layout)


def test_a_folder_that_fits_two_layouts_is_not_guessed(tmp_path):
    put_diffusers(tmp_path, widget=True)
    put_comfyui(tmp_path, 1, graph())
    assert "fits the layouts diffusers and comfyui; choose one with --layout" in refusal(tmp_path)
