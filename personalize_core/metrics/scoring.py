"""Score pictures: which is compared with what (methods.md 13.1), and the rows that come of it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from personalize_core.data import load_picture
from personalize_core.files import read_json, sha256
from personalize_core.metrics import features, similarity, tables


@dataclass(frozen=True)
class Encoders:
    """What a table is measured with."""

    text_image: features.TextImageEncoder  # CLIP-T and CLIP-I
    identity: features.Encoder  # DINO


def load_encoders(text_image: str, identity: str, device: str) -> Encoders:
    return Encoders(
        features.load_text_image_encoder(text_image, device), features.load_identity_encoder(identity, device)
    )


def which(name: str) -> str:
    """Names an encoder's weights without loading them: the hash of local ones, the commit of published ones."""
    published = features.TEXT_IMAGE | features.IDENTITY
    mini = {"mini-clip": "clip", "mini-identity": "identity"}
    if name in published:
        return f"{name} {published[name].repository}@{published[name].revision}"
    folder = features.MINI_WEIGHTS / mini[name] if name in mini else Path(name.partition(":")[2] or name)
    weights = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return f"{name} {' '.join(sha256(path) for path in weights)}"


def score_grid(
    root: Path, grid: Path, photographs: Sequence[Path], encoders: Encoders, without_identity: Set[int] = frozenset()
) -> pl.DataFrame:
    """Every picture of a grid: CLIP-T with its prompt, CLIP-I and DINO with the concept's photographs.

    CLIP-T compares with the prompt that has the class noun in the concept's place, for no encoder knows the
    placeholder.

    Args:
        without_identity: places of prompts that change the look of the concept, so that a protocol wants no likeness
            to its photographs there: those pictures have no rows but CLIP-T's.

    Raises:
        InputError: a picture that the grid lists is missing or damaged.
    """
    described = read_json(grid / "grid.json")
    cells = [
        (variant, prompt, image)
        for variant in described["variants"]
        for prompt in range(len(described["templates"]))
        for image in range(described["images_per_prompt"])
    ]
    paths = [grid / f"{variant}/{prompt:02d}_{image:02d}.png" for variant, prompt, image in cells]
    pictures = [load_picture(path) for path in paths]
    references = [load_picture(path) for path in photographs]
    texts = [template.replace("{}", described["class_noun"]) for template in described["templates"]]

    seen = encoders.text_image.images(pictures)
    said = encoders.text_image.texts(texts)[[prompt for _, prompt, _ in cells]]
    cosines = similarity.text_alignment_per_image(seen, said)
    scores = {
        "clip_t": cosines,
        "clip_t_scaled": similarity.clip_score(cosines),
        "clip_i": similarity.image_alignment_per_image(seen, encoders.text_image.images(references)),
        "dino": similarity.image_alignment_per_image(
            encoders.identity.images(pictures), encoders.identity.images(references)
        ),
    }
    about = [
        {
            "base_model": described["base_model"],
            "concept": described["concept"],
            "method": described["method"],
            "variant": variant,
            "prompt_index": prompt,
            "prompt": described["templates"][prompt],
            "image_index": image,
            "text": texts[prompt],
        }
        for variant, prompt, image in cells
    ]
    table = _rows(root, about, paths, scores, encoders)
    skipped = pl.col("prompt_index").is_in(list(without_identity)) & ~pl.col("metric").str.starts_with("clip_t")
    return table.filter(~skipped)


def score_references(root: Path, concept: str, photographs: Sequence[Path], encoders: Encoders) -> pl.DataFrame:
    """The concept's photographs, each with all the others: CLIP-I and DINO. One alone has no others, and no row."""
    if len(photographs) < 2:
        return tables.from_rows([])
    pictures = [load_picture(path) for path in photographs]
    scores = {
        "clip_i": similarity.real_alignment_per_image(encoders.text_image.images(pictures)),
        "dino": similarity.real_alignment_per_image(encoders.identity.images(pictures)),
    }
    about = [
        {"concept": concept, "method": tables.CEILING, "variant": tables.CEILING, "image_index": index}
        for index in range(len(pictures))
    ]
    return _rows(root, about, photographs, scores, encoders)


def means(table: pl.DataFrame) -> dict[str, float]:
    """Mean of each metric over a table's pictures, for reports; several variants are told apart."""
    several = table["variant"].n_unique() > 1
    return {
        f"{variant}.{metric}" if several else metric: float(group["score"].to_numpy().mean())
        for (variant, metric), group in table.group_by("variant", "metric", maintain_order=True)
    }


def _rows(
    root: Path, about: list[dict[str, Any]], paths: Sequence[Path], scores: dict[str, Tensor], encoders: Encoders
) -> pl.DataFrame:
    rows = []
    for index, (what, path) in enumerate(zip(about, paths, strict=True)):
        picture = {"image": path.relative_to(root).as_posix(), "image_sha256": sha256(path)}
        for metric, values in scores.items():
            encoder = encoders.identity if metric == "dino" else encoders.text_image
            compared_with = what.get("text") if metric.startswith("clip_t") else None
            measured = {
                "metric": metric,
                "encoder": encoder.name,
                "encoder_sha256": encoder.weights_hash,
                "preprocessing": encoder.preprocessing,
                "text": compared_with,
                "score": float(values[index]),
            }
            rows.append({**what, **picture, **measured})
    return tables.from_rows(rows)
