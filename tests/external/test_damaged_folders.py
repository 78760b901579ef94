"""Whatever the files of a layout hold, a folder is listed or refused with a short text, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from personalize_core.external.layouts import LAYOUTS, read_listing
from personalize_core.external.listing import Listing
from tests.external import test_layouts as layouts
from tests.external.folders_of_images import put_image, put_text
from tests.mutated import outcomes, put

DAMAGED = 150  # copies of each file


def manifest(root: Path) -> Path:
    put_image(root / "a.png")
    put_image(root / "b.png")
    return put_text(root / "prompts.csv", 'file,prompt,seed\na.png,"a dog, in snow",1\nb.png,a dog,2\n')


def manifest_in_lines(root: Path) -> Path:
    put_image(root / "a.png")
    return put_text(root / "prompts.jsonl", '{"file": "a.png", "prompt": "a dog", "seed": 4}\n' * 2)


def numbered(root: Path) -> Path:
    put_image(root / "0_1.png")
    return put_text(root / "prompts.txt", "# a list\na dog in snow\na dog\n")


def peft(root: Path) -> Path:
    return layouts.put_peft(root, "lora--a") / "results" / "lora--a.json"


def ai_toolkit(root: Path) -> Path:
    sample = {"samples": [{"prompt": "a dog --d 3", "seed": 5}, {"prompt": "b"}], "seed": 42, "walk_seed": True}
    return layouts.put_ai_toolkit(root, sample) / "config.yaml"


def ai_toolkit_prompts(root: Path) -> Path:
    return layouts.put_ai_toolkit(root, {"prompts": ["a [trigger] dog", "a cat"], "seed": 42}) / "config.yaml"


def kohya(root: Path) -> Path:
    layouts.put_kohya(root, "000500", 1)
    return put_text(root / "sample" / "prompt.txt", "a dog --n low quality --d 42\na cat --w 512\n")


def simpletuner(root: Path) -> Path:
    put_image(root / "step_10_beach_0_8x8.png")
    return put_text(root / "user_prompt_library.json", '{"beach": "a dog", "snow": {"prompt": "a dog in snow"}}')


def diffusers(root: Path) -> Path:
    return layouts.put_diffusers(root, widget=True) / "README.md"


def dreambench(root: Path) -> Path:
    layouts.put_dreambench(root, "object_00_mug", ["A mug on a beach."])
    return root / "text" / "object_00_mug" / "0_0.txt"


def customconcept101(root: Path) -> Path:
    return layouts.put_customconcept101(root, {"0": "a dog", "1": "a dog in snow"}) / "prompts.json"


def workspace(root: Path) -> Path:
    return layouts.put_grid(root, "oft") / "grid.json"


def comfyui(root: Path) -> Path:
    layouts.put_comfyui(root, 2, layouts.graph(seed=3))
    return layouts.put_comfyui(root, 1, layouts.graph())


@pytest.mark.parametrize(
    "make",
    [
        manifest,
        manifest_in_lines,
        numbered,
        peft,
        ai_toolkit,
        ai_toolkit_prompts,
        kohya,
        simpletuner,
        diffusers,
        dreambench,
        customconcept101,
        workspace,
        comfyui,
    ],
)
def test_a_damaged_file_is_read_or_refused(tmp_path, make: Callable[[Path], Path]):
    path = make(tmp_path)

    def read(content: bytes) -> None:
        put(path, content)
        check(read_listing(tmp_path))

    accepted, refused = outcomes(path.read_bytes(), read, DAMAGED)
    assert accepted and (refused or make is comfyui)  # there the other image remains


@pytest.mark.parametrize("name", ["p.json", "p.toml"])
def test_a_damaged_file_of_kohyas_prompts_is_read_or_refused(tmp_path, name):
    layouts.put_kohya(tmp_path, "000500", 1)
    text = {
        "p.json": '[{"prompt": "a dog", "seed": 42}, "a cat --s 20"]',
        "p.toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n[[prompt.subset]]\nprompt = "a cat"\n',
    }[name]
    path = put_text(tmp_path / name, text)

    def read(content: bytes) -> None:
        put(path, content)
        check(read_listing(tmp_path, options={"prompts": str(path)}))

    assert all(outcomes(path.read_bytes(), read, DAMAGED))


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"comfyui"}))
def test_a_damaged_graph_in_an_image_is_no_fault_of_another_layout(tmp_path, name):
    put_image(tmp_path / "a.png", {"prompt": "{"})
    LAYOUTS[name].recognises(tmp_path)


def test_a_damaged_graph_is_left_out_with_its_reason(tmp_path):
    layouts.put_comfyui(tmp_path, 1, layouts.graph())

    def read(content: bytes) -> None:
        put_image(tmp_path / "ComfyUI_00002_.png", {"prompt": content.decode("latin-1")})
        listing = read_listing(tmp_path)
        check(listing)
        assert len(listing.images) + len(listing.left_out) == 2

    accepted, _ = outcomes(json.dumps(layouts.graph(seed=1)).encode(), read, DAMAGED)
    assert accepted > DAMAGED // 2


def check(listing: Listing) -> None:
    """What a listing promises."""
    assert listing.images
    for image in listing.images:
        assert not image.file.is_absolute() and ".." not in image.file.parts
        assert image.prompt == " ".join(image.prompt.split()) != ""
        image.prompt.encode()
        assert image.seed is None or 0 <= image.seed < 2**64
    for name, reason in listing.left_out:
        assert name and reason and "\n" not in reason
