"""What PEFT's benchmark of image generation writes: sample images, and one JSON file of results for each experiment.

The layout is that of `method_comparison/image-gen` in https://github.com/huggingface/peft (run.py, utils.py): for each
prompt of `sample_image_prompts` one image, whose generator has the seed of the training + 100,000 + the image's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from personalize_core.errors import InputError, shown
from personalize_core.external.folders import all_named, images_named, inner_folder, object_in, only_or_chosen
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import is_there, read_json_object, user_path

NAME = "peft"
MEANING = (
    "PEFT's `method_comparison/image-gen`: `sample-images/results/EXPERIMENT_NN.png` and `results/EXPERIMENT.json`"
)
OPTIONS: Mapping[str, str] = {
    "method": "the experiment, such as `lora--flux2-klein-default`, where there are several",
    "results": "the folder of the JSON files, where it does not lie as in PEFT's repository",
}

SAMPLES, RESULTS = "sample-images", "results"
_FIRST_SEED = 100_000
_NAMED = re.compile(r"(.+--.+)_(\d{2,6})")


def recognises(folder: Path) -> bool:
    return all_named(inner_folder(folder, SAMPLES, RESULTS), _NAMED)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    images_in = inner_folder(folder, SAMPLES, RESULTS)
    found = images_named(images_in, _NAMED)
    if not found:
        raise InputError(f"{images_in} holds no image named EXPERIMENT_NN, as PEFT's benchmark names them")
    experiment = only_or_chosen(options, "method", sorted({match[1] for match in found.values()}), images_in)
    path = _results_of(folder, images_in, options) / f"{experiment}.json"
    config = object_in(read_json_object(path), "run_info", "train_config")
    prompts, seed, model = (config.get(key) for key in ("sample_image_prompts", "seed", "model_id"))
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{path} should hold a list of texts under run_info.train_config.sample_image_prompts")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"{path} should hold a whole number under run_info.train_config.seed, and holds {shown(seed)}")
    numbers = {int(match[2]): name for name, match in found.items() if match[1] == experiment}
    if strange := [name for number, name in numbers.items() if not 1 <= number <= len(prompts)]:
        raise InputError(f"{images_in}: {shown(strange[0])} has no prompt: {path} holds {len(prompts)}")
    inner = images_in.relative_to(folder)
    images = [
        external_image((inner / name).as_posix(), prompts[number - 1], seed + _FIRST_SEED + number, str(path))
        for number, name in sorted(numbers.items())
    ]
    lost = [number for number in range(1, len(prompts) + 1) if number not in numbers]
    left_out = tuple((f"{experiment}_{number:02d}.png", "is not there") for number in lost)
    return Listing(tuple(images), NAME, left_out, model if isinstance(model, str) else None)


def _results_of(folder: Path, images_in: Path, options: Mapping[str, str]) -> Path:
    if "results" in options:
        return user_path(options["results"])
    absolute = images_in.absolute()
    beside = absolute.parent.parent / absolute.name  # sample-images/results -> results
    return beside if absolute.parent.name == SAMPLES and is_there(beside) else images_in
