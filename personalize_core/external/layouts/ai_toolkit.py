"""The samples that ai-toolkit writes while it trains, and the configuration beside them.

The layout is that of https://github.com/ostris/ai-toolkit (jobs/process/BaseSDTrainProcess.py and
toolkit/config_modules.py): `samples/MILLISECONDS__STEP_INDEX.jpg`, and `config.yaml` with the prompts and the seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, shown
from personalize_core.external.folders import (
    all_named,
    chosen,
    images_named,
    inner_folder,
    named_or_found,
    object_in,
    prompts_of,
)
from personalize_core.external.listing import Listing, external_image
from personalize_core.files.outside import read_yaml

NAME = "ai-toolkit"
MEANING = "ai-toolkit: `samples/MILLISECONDS__STEP_INDEX.jpg`, and the training's `config.yaml`"
OPTIONS: Mapping[str, str] = {
    "step": "the training step; the last one, if it is not given",
    "prompts": "the training's configuration (YAML or JSON) or a text file with one prompt a line, if elsewhere",
}

SAMPLES, CONFIG = "samples", "config.yaml"
_NAMED = re.compile(r"(\d{12,16})__(\d{9,12})_(\d{1,6})")
_FLAG = re.compile(r"(\S*)(.*)", re.S)


def recognises(folder: Path) -> bool:
    return all_named(inner_folder(folder, SAMPLES), _NAMED)


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    images_in = inner_folder(folder, SAMPLES)
    found = images_named(images_in, _NAMED)
    if not found:
        raise InputError(f"{images_in} holds no image named MILLISECONDS__STEP_INDEX, as ai-toolkit names them")
    steps = sorted({int(match[2]) for match in found.values()})
    step = int(chosen(options, "step", list(map(str, steps)), images_in) or steps[-1])
    path = named_or_found(folder, options, "prompts", [CONFIG, f"../{CONFIG}"])
    if path is None:
        raise InputError(
            f"{folder} has no {CONFIG}, which holds the prompts; name it, or a text file with one prompt a line, by "
            "the option prompts"
        )
    samples, model = _samples_of(path)
    inner = images_in.relative_to(folder)
    latest: dict[int, tuple[int, str]] = {}
    left_out = []
    for name, match in sorted(
        found.items(), key=lambda one: int(one[1][1])
    ):  # the later of two replaces the earlier one
        if int(match[2]) == step:
            index = int(match[3])
            if index in latest:
                left_out.append(((inner / latest[index][1]).as_posix(), "was made once more later"))
            latest[index] = (index, name)
    images = []
    for index, name in sorted(latest.values()):
        if index >= len(samples):
            raise InputError(
                f"{images_in}: {shown(name)} is of prompt {index}, and {path} holds {len(samples)}, from 0"
            )
        sample = samples[index]
        images.append(external_image((inner / name).as_posix(), sample.prompt, sample.seed, f"{path}, sample {index}"))
    return Listing(tuple(images), NAME, tuple(left_out), model)


@dataclass(frozen=True)
class _Sample:
    prompt: str
    seed: int | None


def _samples_of(path: Path) -> tuple[list[_Sample], str | None]:
    """What was sampled, in the order of the images' indices, and the name of the base model."""
    if path.suffix.lower() == ".txt":
        return [_Sample(*_without_flags(line, None)) for line in prompts_of(path)], None
    processes = object_in(read_yaml(path), "config").get("process")
    process = processes[0] if isinstance(processes, list) and processes else None
    config = object_in(process, "sample")
    prompts = config.get("prompts")
    listed = [{"prompt": prompt} for prompt in prompts] if isinstance(prompts, list) else []
    written = config.get("samples", listed)
    if not isinstance(written, list) or not written:
        raise InputError(f"{path} holds no prompts under config.process[0].sample.prompts")
    seed, walks = _whole(config.get("seed", 0)), bool(config.get("walk_seed", False))
    trigger = object_in(process).get("trigger_word")
    current, samples = seed, []
    for index, item in enumerate(written):
        prompt = item.get("prompt") if isinstance(item, dict) else None
        if not isinstance(prompt, str):
            raise InputError(f"{path}: sample {index} should hold a prompt, and is {shown(item)}")
        if walks and seed is not None:
            current = seed + index
        if item.get("seed") is not None:
            current = _whole(item["seed"])  # and so it stays for those that follow, as in ai-toolkit
        if isinstance(trigger, str):
            prompt = prompt.replace("[trigger]", trigger).replace("[name]", trigger)
        samples.append(_Sample(*_without_flags(prompt, current)))
    model = object_in(process, "model").get("name_or_path")
    return samples, model if isinstance(model, str) else None


def _without_flags(text: str, seed: int | None) -> tuple[str, int | None]:
    """The prompt before its flags, and the seed that one of them sets."""
    prompt, *flags = text.split("--")
    for flag in flags:
        name, value = _FLAG.fullmatch(flag).groups()  # type: ignore[union-attr]  # it matches every text
        if name in ("d", "seed") and re.fullmatch(r"-?\d{1,20}", value.strip()):
            seed = _whole(int(value))
    return prompt, seed


def _whole(value: Any) -> int | None:
    """A seed; None for -1, which stands for a random one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
