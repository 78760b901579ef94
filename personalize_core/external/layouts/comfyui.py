"""A folder of images that ComfyUI's SaveImage node wrote, with the graph that made each in its PNG.

The text chunk `prompt` holds the graph in the form of ComfyUI's API (https://github.com/comfyanonymous/ComfyUI,
nodes.py): an object of nodes, each with its class and its inputs, and an input is a value or [node, output]. The prompt
and the seed are found by following the inputs from the node that saved the image up to the nearest sampler.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personalize_core.errors import InputError, shown
from personalize_core.external.folders import chosen, image_names, object_in, png_header
from personalize_core.external.listing import ExternalImage, Listing, external_image
from personalize_core.files.outside import parse_json

NAME = "comfyui"
MEANING = "ComfyUI: `PREFIX_NUMBER_.png`, with the prompt and the seed in each image's metadata"
OPTIONS: Mapping[str, str] = {"prefix": "take only images whose names begin with this `filename_prefix`"}

_NAMED = re.compile(r"(.+)_\d{5,}_")
_SEEDS = ("seed", "noise_seed")
_TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "value")
_MODELS = ("ckpt_name", "unet_name", "model_name")
_LOOKED_AT = 5  # images, to see whether the folder is ComfyUI's


class _Unclear(Exception):
    """Why the graph does not say what is needed, to follow the image's name."""


def recognises(folder: Path) -> bool:
    return any(_has_graph(folder / name) for name in _pngs(folder)[:_LOOKED_AT])


def read(folder: Path, options: Mapping[str, str]) -> Listing:
    names = image_names(folder)
    prefixes = sorted({found[1] for name in names if (found := _NAMED.fullmatch(Path(name).stem))})
    prefix = chosen(options, "prefix", prefixes, folder)
    images: list[ExternalImage] = []
    left_out: list[tuple[str, str]] = []
    models: set[str] = set()
    for name in names:
        found = _NAMED.fullmatch(Path(name).stem)
        if prefix is not None and (found is None or found[1] != prefix):
            continue
        try:
            graph = _graph_of(folder / name)
            saved = _saved_by(graph, found[1] if found else "")
            sampler = _sampler_of(graph, saved)
            image = external_image(name, _prompt_of(graph, sampler), _seed_of(graph, sampler), str(folder / name))
        except (_Unclear, InputError) as error:
            left_out.append((name, str(error)))
            continue
        images.append(image)
        models.update(_models_of(graph, sampler))
    return Listing(tuple(images), NAME, tuple(left_out), models.pop() if len(models) == 1 else None)


def _pngs(folder: Path) -> list[str]:
    return [name for name in image_names(folder) if name.lower().endswith(".png")]


def _has_graph(path: Path) -> bool:
    try:
        return bool(_graph_of(path))
    except (_Unclear, InputError):
        return False


def _graph_of(path: Path) -> dict[str, Any]:
    """The nodes by their names."""
    header = png_header(path)
    if header is None:
        raise _Unclear("is not a PNG that can be read")
    if "prompt" not in header[1]:
        raise _Unclear("has no graph of ComfyUI in its metadata")
    graph = parse_json(header[1]["prompt"], path)
    if not isinstance(graph, dict) or not any(object_in(node, "inputs") for node in graph.values()):
        raise _Unclear("has metadata that are not a graph of ComfyUI")
    return graph


def _inputs(graph: Mapping[str, Any], node: str) -> dict[str, Any]:
    return object_in(graph, node, "inputs")


def _linked(value: Any, graph: Mapping[str, Any]) -> tuple[str, int] | None:
    """The node and its output that an input is linked to."""
    if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


def _upstream(graph: Mapping[str, Any], start: str) -> Iterator[str]:
    """A node and all that it depends on, the nearest first."""
    seen, waiting = {start}, deque([start])
    while waiting:
        node = waiting.popleft()
        yield node
        for value in _inputs(graph, node).values():
            link = _linked(value, graph)
            if link and link[0] not in seen:
                seen.add(link[0])
                waiting.append(link[0])


def _saved_by(graph: Mapping[str, Any], prefix: str) -> str:
    """The node that saved an image whose name has this prefix."""
    saving = [node for node in graph if "filename_prefix" in _inputs(graph, node)]
    same = [node for node in saving if Path(str(_inputs(graph, node)["filename_prefix"])).name == prefix]
    found = same if len(same) == 1 else saving
    if len(found) != 1:
        raise _Unclear(f"has {len(found)} nodes in its graph that may have saved it")
    return found[0]


def _sampler_of(graph: Mapping[str, Any], saved: str) -> str:
    """The nearest sampler: a node that takes a seed and a conditioning, or noise and a guider."""
    for node in _upstream(graph, saved):
        inputs = _inputs(graph, node)
        if ("positive" in inputs and any(key in inputs for key in _SEEDS)) or {"noise", "guider"} <= inputs.keys():
            return node
    raise _Unclear("has no sampler in its graph")


def _prompt_of(graph: Mapping[str, Any], sampler: str) -> str:
    """The one text that the sampler's positive conditioning is made of."""
    inputs = _inputs(graph, sampler)
    key = "positive" if "positive" in inputs else "guider"
    texts = {" ".join(text.split()) for text in _texts(graph, inputs.get(key), set())} - {""}
    if len(texts) != 1:
        raise _Unclear(
            f"is made of {len(texts)} texts: {shown(sorted(texts))}" if texts else "has no prompt in its graph"
        )
    return texts.pop()


def _texts(graph: Mapping[str, Any], value: Any, seen: set[tuple[str, int]]) -> Iterator[str]:
    """The texts that a conditioning, or a text that is an input, is made of."""
    link = _linked(value, graph)
    if link is None or link in seen:
        return
    seen.add(link)
    node, output = link
    inputs = _inputs(graph, node)
    if "positive" in inputs:  # such as ControlNetApplyAdvanced, whose outputs are positive and negative, or a guider
        yield from _texts(graph, inputs["negative" if output == 1 and "negative" in inputs else "positive"], seen)
        return
    held = [key for key in _TEXTS if isinstance(inputs.get(key), str)]
    linked = [key for key in _TEXTS if _linked(inputs.get(key), graph)]
    if held or linked:
        yield from (inputs[key] for key in held)
        for key in linked:
            yield from _texts(graph, inputs[key], seen)
        return
    for inner in inputs.values():
        yield from _texts(graph, inner, seen)


def _seed_of(graph: Mapping[str, Any], sampler: str) -> int | None:
    """The image's seed; None where the graph does not say it, or one seed makes several images (a batch)."""
    for node in _upstream(graph, sampler):
        size = _whole(graph, _inputs(graph, node).get("batch_size", 1), set())
        if size != 1:
            return None
    inputs = _inputs(graph, sampler)
    if "noise" in inputs and (link := _linked(inputs["noise"], graph)):
        inputs = _inputs(graph, link[0])
    return next((_whole(graph, inputs[key], set()) for key in _SEEDS if key in inputs), None)


def _whole(graph: Mapping[str, Any], value: Any, seen: set[str]) -> int | None:
    """A whole number that is an input, or that a node which is linked to it holds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    link = _linked(value, graph)
    if link is None or link[0] in seen:
        return None
    seen.add(link[0])
    inputs = _inputs(graph, link[0])
    return next((_whole(graph, inputs[key], seen) for key in (*_SEEDS, "value", "int") if key in inputs), None)


def _models_of(graph: Mapping[str, Any], sampler: str) -> Iterator[str]:
    for node in _upstream(graph, sampler):
        yield from (value for key in _MODELS if isinstance(value := _inputs(graph, node).get(key), str))
