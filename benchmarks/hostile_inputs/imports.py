"""Files of other programs, as `personalize import` reads them: embeddings, LoRAs, rotations and whole U-Nets."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.hostile_inputs import workspaces
from benchmarks.hostile_inputs.runner import Case, Right, anything, finish
from personalize_core import steps
from personalize_core.base_model.model import BaseModel
from personalize_core.methods import method_class, recipe_class
from personalize_core.workspace.recipes import load_base
from personalize_core.workspace.store import Store
from tests.artifacts.test_foreign import (
    BAD_NUMBERS,
    LAYER,
    Payload,
    kohya,
    kohyas_default_targets,
    lora,
    oldest,
    peft,
    renamed,
)
from tests.conftest import disturbed
from tests.mutated import mutants

MUTANTS = {"embedding": 24, "lora": 18, "adapter_config": 10, "unet_config": 10}
LORA = "lora_dreambooth"


def brought_in(method: str, source: str, folder: Path) -> dict[str, Tensor]:
    """`personalize import`: the weights of the new artifact."""
    report = steps.import_artifact(Store(folder / "workspace"), workspaces.CONCEPT, method, folder / "input" / source)
    return load_file(report.path / "weights.safetensors")


def case(
    name: str,
    method: str,
    source: Path,
    give: Callable[[Path], Any],
    right: Right,
    file: str = "x.safetensors",
    holds: Callable[[Any], bool] = anything,
) -> Case:
    """`give` puts the file or folder at the path it is called with."""

    def fill(folder: Path) -> None:
        workspaces.copied(source / "plain", folder)
        (folder / "input").mkdir()
        give(folder / "input" / file)

    read, made = partial(brought_in, method, file), f"workspace/data/artifacts/{method}"
    return Case(f"imports/{name}", fill, read, right, holds, ("input",), made=(made,))


def prepare(folder: Path) -> None:
    """All files that a model is needed for, made in a fork: the others are damaged copies of these."""
    workspaces.plain(folder / "plain")
    if not (folder / "good").exists():
        finish(lambda: make_good(folder / "good", load_base(Store(folder / "plain"))))


def make_good(to: Path, base: BaseModel) -> None:
    to.mkdir()
    concept = Store(to.parent / "plain").concept(workspaces.CONCEPT)
    vector = torch.arange(1.0, base.text_width + 1) / 8
    save_file({"emb_params": vector[None]}, to / "embedding.safetensors")
    tensors, sides = lora(base), {"A": "down", "B": "up"}
    for name, form in {
        "lora": tensors,
        "kohya": kohya(tensors),
        "diffusers 0.10": renamed(tensors, oldest),
        "diffusers 0.15": renamed(tensors, lambda layer, side: f"unet.{oldest(layer, side)}"),
        "diffusers 0.17": renamed(tensors, lambda layer, side: f"unet.{layer}.lora.{sides[side]}.weight"),
    }.items():
        save_file(form, to / f"{name}.safetensors")
    save_file(kohyas_default_targets(base, 3), to / "kohya of all targets.safetensors")
    peft(to / "peft", tensors)
    base.unet.save_pretrained(to / "unet")
    for name in ("oft", "dreambooth", "custom_diffusion"):
        method: Any = disturbed(method_class(name)(recipe_class(name)(), base, concept))
        method.export(base, to / name)


def cases(folder: Path) -> Iterator[Case]:
    for make in (harmless, embeddings, loras, metadata, adapters, numbers, no_weights, networks, mutated):
        yield from make(folder)


def same_lora(good: Path, found: Mapping[str, Tensor]) -> bool:
    """Are the factors of each layer those of the file by diffusers' names?"""
    expected = load_file(good / "lora.safetensors")
    factors = {name: tensor for name, tensor in found.items() if tensor.ndim == 2}
    return sorted(map(hash_of, factors.values())) == sorted(map(hash_of, expected.values()))


def hash_of(tensor: Tensor) -> bytes:
    return tensor.float().contiguous().numpy().tobytes()


def harmless(folder: Path) -> Iterator[Case]:
    good = folder / "good"
    vector = load_file(good / "embedding.safetensors")["emb_params"]

    def same_vector(found: Mapping[str, Tensor]) -> bool:
        return any(torch.equal(tensor.flatten(), vector.flatten()) for tensor in found.values())

    for name, tensors in {
        "as exported": {"emb_params": vector},
        "of one dimension": {"emb_params": vector[0]},
        "of three dimensions": {"emb_params": vector[None]},
        "as diffusers' script saves it": {"<another word>": vector},
        "in half precision": {"emb_params": vector.half()},
        "in bfloat16": {"emb_params": vector.bfloat16()},
        "in double precision": {"emb_params": vector.double()},
    }.items():
        give = partial(save_file, tensors)
        yield case(f"embedding {name}", "textual_inversion", folder, give, "accepted", holds=same_vector)
    files = ("lora", "kohya", "diffusers 0.10", "diffusers 0.15", "diffusers 0.17", "peft")
    for name in files:
        path = good / name if name == "peft" else good / f"{name}.safetensors"
        give = partial(copy, path)
        yield case(f"LoRA, {name}", LORA, folder, give, "accepted", path.name, partial(same_lora, good))
    path = good / "kohya of all targets.safetensors"
    yield case("LoRA, kohya of all targets", LORA, folder, partial(copy, path), "accepted", path.name)
    for method in ("oft", "dreambooth", "custom_diffusion"):
        path = good / method / "oft" if method == "oft" else good / method
        yield case(f"{method} as exported", method, folder, partial(copy, path), "accepted", path.name)
    yield case("a U-Net's own folder", "dreambooth", folder, partial(copy, good / "unet"), "accepted", "unet")


def copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)


def embeddings(folder: Path) -> Iterator[Case]:
    vector = load_file(folder / "good" / "embedding.safetensors")["emb_params"]
    width = vector.shape[1]
    spoiled = vector.clone()
    spoiled[0, 3] = math.nan
    for name, tensors in {
        "one NaN": {"emb_params": spoiled},
        "infinite": {"emb_params": vector * math.inf},
        "1e30": {"emb_params": vector * 1e30},
        "zeros": {"emb_params": torch.zeros_like(vector)},
        "integers": {"emb_params": vector.to(torch.int64)},
        "booleans": {"emb_params": vector > 0},
        "complex": {"emb_params": vector.to(torch.complex64)},
        "768 wide": {"emb_params": torch.ones(1, 768)},
        "one too narrow": {"emb_params": torch.ones(1, width - 1)},
        "eight vectors": {"emb_params": torch.ones(8, width)},
        "no vector": {"emb_params": torch.ones(0, width)},
        "empty": {"emb_params": torch.zeros(0)},
        "a number": {"emb_params": torch.tensor(1.0)},
        "SDXL": {"clip_g": torch.ones(1, 1280), "clip_l": torch.ones(1, 768)},
        "no tensor": {},
    }.items():
        yield case(f"embedding: {name}", "textual_inversion", folder, partial(save_file, tensors), "refused")


def loras(folder: Path) -> Iterator[Case]:
    whole = load_file(folder / "good" / "kohya.safetensors")
    for name, change in {
        "DoRA": {f"{LAYER}.dora_scale": torch.ones(2, 2)},
        "LoHa": {f"{LAYER}.hada_w1_a": torch.ones(2, 2)},
        "LoKr": {f"{LAYER}.lokr_w1": torch.ones(2, 2)},
        "OFT": {f"{LAYER}.oft_blocks": torch.ones(2, 2)},
        "Tucker": {f"{LAYER}.lora_mid.weight": torch.ones(2, 2)},
        "a bias": {f"{LAYER}.bias": torch.ones(16)},
        "one dimension": {f"{LAYER}.lora_down.weight": torch.ones(2)},
        "two ranks": {f"{LAYER}.lora_down.weight": torch.ones(3, 16)},
        "rank 0": {f"{LAYER}.lora_down.weight": torch.ones(0, 16), f"{LAYER}.lora_up.weight": torch.ones(16, 0)},
        "alpha NaN": {f"{LAYER}.alpha": torch.tensor(math.nan)},
        "two alphas": {f"{LAYER}.alpha": torch.tensor([1.0, 2.0])},
        "unknown layer": {"lora_unet_some_layer.lora_down.weight": torch.ones(2, 2)},
        "SDXL": {"lora_te2_text_model_x.lora_down.weight": torch.ones(2, 2)},
        "no UTF-8 in a name": {"lora_unet_\u202e.lora_down.weight": torch.ones(2, 2)},
        "a name of 100,000 characters": {"x" * 100_000: torch.ones(2, 2)},
    }.items():
        yield case(f"LoRA: {name}", LORA, folder, partial(save_file, whole | change), "refused")
    halves = {name: tensor for name, tensor in whole.items() if "lora_up" not in name}
    yield case("LoRA: no upper factors", LORA, folder, partial(save_file, halves), "refused")
    yield case("LoRA: an embedding", LORA, folder, partial(copy, folder / "good" / "embedding.safetensors"), "refused")
    lora = partial(copy, folder / "good" / "lora.safetensors")
    for method in ("textual_inversion", "oft", "dreambooth", "custom_diffusion", "personalized_residuals"):
        yield case(f"a LoRA as {method}", method, folder, lora, "refused")
    for method in ("neti", "vico", "xti", "base_model", "core", "attn_dreambooth"):
        yield case(f"a LoRA as {method}", method, folder, lora, "refused")


def metadata(folder: Path) -> Iterator[Case]:
    tensors = load_file(folder / "good" / "lora.safetensors")
    for about in (
        "{",
        "[1]",
        "[" * 100_000,
        '{"unet.r": 2, "unet.lora_alpha": null}',
        '{"unet.lora_alpha": []}',
        '{"unet.lora_alpha": true}',
        '{"unet.lora_alpha": 1e999}',
        '{"unet.use_dora": true}',
        '{"unet.lora_alpha": 1, "unet.lora_alpha": 2}',
    ):
        give = partial(save_file, tensors, metadata={"format": "pt", "lora_adapter_metadata": about})
        yield case(f"metadata {about[:40]!r}", LORA, folder, give, "refused")
    give = partial(save_file, tensors, metadata={"format": "pt", "ss_tag_frequency": "[" * 100_000})
    yield case("metadata of another program", LORA, folder, give, "accepted")


def adapters(folder: Path) -> Iterator[Case]:
    good = folder / "good" / "peft"
    for about in (
        {"peft_type": "LOHA"},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_alpha": 0},
        {"lora_alpha": "x"},
        {"lora_alpha": None},
        {"r": 0},
        {"rank_pattern": []},
        {"alpha_pattern": {"x": []}},
    ):
        unread = {"r", "rank_pattern", "alpha_pattern"} & about.keys()  # the factors themselves have a rank
        give = partial(with_config, good, about)
        yield case(f"PEFT {about}", LORA, folder, give, "either" if unread else "refused", "peft")
    for name, text in (("list", b"[]"), ("deep", b"[" * 100_000), ("empty", b""), ("latin-1", b'{"r": "\xe9"}')):
        give = partial(with_config, good, text)
        yield case(f"PEFT's configuration: {name}", LORA, folder, give, "refused", "peft")


def with_config(source: Path, about: Mapping[str, Any] | bytes, to: Path, name: str = "adapter_config.json") -> None:
    copy(source, to)
    path = to / name
    path.write_bytes(about if isinstance(about, bytes) else json.dumps(json.loads(path.read_text()) | about).encode())


def numbers(folder: Path) -> Iterator[Case]:
    """Numbers that no weights have, in every file that a method exports."""
    good = folder / "good"
    for method, source in {
        LORA: good / "peft",
        "oft": good / "oft" / "oft",
        "dreambooth": good / "dreambooth",
        "custom_diffusion": good / "custom_diffusion",
    }.items():
        for said, spoil in BAD_NUMBERS.items():
            give = partial(with_numbers, source, spoil)
            yield case(f"{method}: {said}", method, folder, give, "refused", source.name)


def with_numbers(source: Path, spoil: Callable[[Tensor], Tensor], to: Path) -> None:
    copy(source, to)
    for path in to.rglob("*.safetensors"):
        spoiled = {name: spoil(tensor).contiguous() for name, tensor in load_file(path).items() if tensor.numel()}
        if path.parent.name != "embeddings":
            save_file(spoiled, path)


def no_weights(folder: Path) -> Iterator[Case]:
    """What is no safetensors file at all."""
    contents = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "text": b"not one",
        "a pickle by another name": pickle.dumps(Payload(folder / "ran")),
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "a header of 99 MB": (99_000_000).to_bytes(8, "little") + b" " * 1000,
        "an empty header": (2).to_bytes(8, "little") + b"{}",
        "a deep header": header(b'{"__metadata__": ' + b"[" * 100_000),
        "offsets beyond the end": header(b'{"emb_params": {"dtype":"F32","shape":[1,32],"data_offsets":[0,999999]}}'),
        "a shape of 2^62": header(
            b'{"emb_params": {"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
        ),
        "a png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "zeros": bytes(5000),
    }
    for name, content in contents.items():
        for method in ("textual_inversion", LORA):
            give = partial(Path.write_bytes, data=content)
            yield case(f"{method}: {name}", method, folder, give, "refused")
    for file in ("x.bin", "x.pt", "x.ckpt", "X.PTH", "x.pkl"):
        give = partial(Path.write_bytes, data=pickle.dumps(Payload(folder / "ran")))
        yield case(f"a pickle {file}", "textual_inversion", folder, give, "refused", file)
    for name, make in {
        "a FIFO": os.mkfifo,
        "a device": lambda path: os.symlink("/dev/zero", path),
        "a dangling link": lambda path: os.symlink("/nowhere", path),
        "a link to itself": lambda path: os.symlink(path.name, path),
        "an empty folder": Path.mkdir,
        "nothing": lambda path: None,
    }.items():
        for method in ("textual_inversion", LORA, "dreambooth"):
            yield case(f"{method}: {name}", method, folder, make, "refused")


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def networks(folder: Path) -> Iterator[Case]:
    good, weights = folder / "good" / "unet", "diffusion_pytorch_model.safetensors"

    def without(name: str, to: Path) -> None:
        copy(good, to)
        tensors = load_file(to / weights)
        del tensors[name]
        save_file(tensors, to / weights)

    def further(to: Path) -> None:
        copy(good, to)
        save_file(load_file(to / weights) | {"conv_out.more": torch.ones(4)}, to / weights)

    def renamed_pickle(to: Path) -> None:
        copy(good, to)
        (to / weights).unlink()
        (to / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))

    for name in ("conv_out.bias", "conv_in.weight"):
        yield case(f"a U-Net without {name}", "dreambooth", folder, partial(without, name), "refused", "unet")
    yield case("a U-Net with a further tensor", "dreambooth", folder, further, "refused", "unet")
    yield case("a U-Net as a pickle", "dreambooth", folder, renamed_pickle, "refused", "unet")
    for about in (
        {"layers_per_block": 100_000},
        {"attention_head_dim": 4},
        {"block_out_channels": [1 << 40] * 4},
        {"cross_attention_dim": None},
        b"[]",
        b"",
        b"[" * 100_000,
        b'{"a": "\xe9"}',
    ):
        give = partial(with_config, good, about, name="config.json")
        yield case(f"a U-Net with {str(about)[:40]}", "dreambooth", folder, give, "refused", "unet")


def mutated(folder: Path) -> Iterator[Case]:
    good = folder / "good"
    for method, name in (("textual_inversion", "embedding"), (LORA, "lora")):
        content = (good / f"{name}.safetensors").read_bytes()
        end = int.from_bytes(content[:8], "little") + 8
        for number, mutant in enumerate(mutants(content[:end], MUTANTS[name], seed=4)):
            give = partial(Path.write_bytes, data=mutant + content[end:])
            yield case(f"mutated {name} {number}", method, folder, give, "either", holds=finite)
    for kind, source, method in (("adapter_config", good / "peft", LORA), ("unet_config", good / "unet", "dreambooth")):
        file = f"{kind.removeprefix('unet_')}.json"
        for number, mutant in enumerate(mutants((source / file).read_bytes(), MUTANTS[kind], seed=4)):
            give = partial(with_config, source, mutant, name=file)
            yield case(f"mutated {kind} {number}", method, folder, give, "either", source.name, finite)


def finite(found: Mapping[str, Tensor]) -> bool:
    return bool(found) and all(bool(tensor.isfinite().all()) for tensor in found.values())
