"""All metric variants on 50 images, against tests/recomputed_scores.py, which shares no code with ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from personalize_core.concepts.concept import Concept
from personalize_core.metrics import features, scoring, summaries, tables
from personalize_core.metrics.encoder_names import MINI_WEIGHTS
from personalize_core.mini import concepts, places, world
from tests import recomputed_scores, tiny_workspace

WEIGHTS = MINI_WEIGHTS
TEMPLATES = [
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a sketch of a {}",
    "a {} in the snow",
    "a painting of a {}",
]
IMAGES = 5  # of each prompt, for each of two concepts: 50
TEXTS = ["class_phrase", "slot_deleted", "full_prompt"]
CONCEPTS = {name: Concept(name, f"<{name}>", concepts.category(name)) for name in ("teapot1", "dog1")}


def noise_image(rng: np.random.Generator, number: int) -> Image.Image:
    """Of the mini world, of several shapes; every seventh is a place with nothing in it."""
    sampled = world.draw(world.random_scene(rng))[0]
    if number % 7 == 3:
        sampled = (places.draw("beach", rng) * 255).astype(np.uint8)
    size = [(64, 64), (96, 80), (50, 121), (64, 64)][number % 4]
    return Image.fromarray(sampled) if size == (64, 64) else Image.fromarray(sampled).resize(size)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Two concepts with five concept images each, one with masks of its own, and a grid of 25 images of each."""
    root, rng = tmp_path_factory.mktemp("workspace"), np.random.default_rng(3)
    tiny_workspace.tiny_encoders(root / "models")
    for number, concept in enumerate(CONCEPTS.values()):
        source, folder = Path(concepts.__file__).parents[2] / "data" / "concepts" / concept.name, root / concept.name
        shutil.copytree(source, folder)
        if number == 1:
            shutil.rmtree(folder / "masks")
        grid = root / "grids" / concept.name
        (grid / "plain").mkdir(parents=True)
        for prompt in range(len(TEMPLATES)):
            for image in range(IMAGES):
                noise_image(rng, prompt * IMAGES + image).save(grid / "plain" / f"{prompt:02d}_{image:02d}.png")
        about = {"base_model": "mini", "concept": concept.name, "class_noun": concept.class_noun, "method": "vico"}
        about |= {"variants": ["plain"], "templates": TEMPLATES, "images_per_prompt": IMAGES}
        (grid / "grid.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def ours(workspace) -> pl.DataFrame:
    encoders = features.load_encoders(
        ["mini-clip", str(workspace / "models" / "clip")],
        ["mini-identity", str(workspace / "models" / "identity")],
        "mini-segmenter",
        TEXTS,
        "cpu",
    )
    found = []
    for name, concept in CONCEPTS.items():
        concept_images = sorted((workspace / name).glob("*.png"))
        found.append(scoring.score_grid(workspace, workspace / "grids" / name, concept, concept_images, encoders))
        found.append(scoring.score_references(workspace, concept, concept_images, encoders))
    assert not [absence for one in found for absence in one.absent]
    return tables.concatenate([one.table for one in found])


@pytest.fixture(scope="module")
def theirs(workspace):
    """Two of each encoder: shorter side and bicubic, or squashed and bilinear, as the folders' own files say."""
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    of_text = {
        "mini-clip": recomputed_scores.OfText(WEIGHTS / "clip", (64, bicubic, 0.5, 0.5)),
        "clip": recomputed_scores.OfText(workspace / "models" / "clip", (16, bicubic, 0.5, 0.5)),
    }
    of_identity = {
        "mini-identity": recomputed_scores.OfIdentity(WEIGHTS / "identity", (64, bicubic, 0.5, 0.5)),
        "identity": recomputed_scores.OfIdentity(workspace / "models" / "identity", (16, bilinear, 0.5, 0.5)),
    }
    segmenter = recomputed_scores.MiniSegmenter(WEIGHTS / "segmenter" / "model.safetensors")
    scores, shares = {}, {}
    for name, concept in CONCEPTS.items():
        folders = workspace / "grids" / name, workspace / name
        found, masked = recomputed_scores.scores_of(
            *folders, concept.class_noun, concept.placeholder, of_text, of_identity, segmenter
        )
        scores |= {(name, *key): score for key, score in found.items()}
        shares |= {(name, key): share for key, share in masked.items()}
    return scores, shares


def place(row: dict) -> str:
    """The image as the other script names it: in its grid, or the concept image's file name."""
    return (
        row["image"].partition("/")[2].partition("/")[2] if row["prompt_index"] is not None else Path(row["image"]).name
    )


def test_every_score_of_every_variant_is_the_other_scripts(ours, theirs):
    scores, _ = theirs
    found = {(r["concept"], r["metric"], r["encoder"], place(r)): r["score"] for r in ours.iter_rows(named=True)}
    assert found.keys() == scores.keys()
    absent = ("masc", "judge")  # neither is asked for; and nothing is held out
    measured = {
        name for name, measure in tables.MEASURES.items() if not measure.trained_on and not name.startswith(absent)
    }
    assert set(ours["metric"]) == measured
    assert len(found) == 2 * (25 * (6 * 2 + 4 * 2) + 5 * 8)
    assert max(abs(found[key] - scores[key]) for key in found) < 1e-5


def test_scores_of_different_variants_are_different_scores(ours):
    """Else the comparison above could not tell one from the other."""
    means = ours.group_by("metric", "encoder").agg(pl.col("score").mean())
    assert means["score"].n_unique() == len(means)


def test_plain_and_scaled_differ_by_the_factor_where_cosines_are_positive(ours):
    wide = ours.filter(prompt_index=0, encoder="mini-clip").pivot("metric", index=["concept", "image"], values="score")
    positive = wide.filter(pl.col("clip_t") > 0)
    assert len(positive)
    assert positive["clip_t_scaled"].to_list() == pytest.approx((positive["clip_t"] * 2.5).to_list(), abs=1e-12)


def test_empty_masks_are_the_other_scripts_and_stay_in_every_mean(ours, theirs):
    scores, shares = theirs
    masked = ours.filter(metric="dino_masked", encoder="mini-identity")
    found = {(row["concept"], place(row)): row["foreground"] for row in masked.iter_rows(named=True)}
    assert found == pytest.approx(shares, abs=1e-12)
    sampled = {key: share for key, share in shares.items() if key[1].startswith("plain/")}
    empty = sum(share < 0.01 for share in sampled.values())
    assert 0 < empty < len(sampled)
    rows = summaries.summarise(ours, draws=100).filter(metric="dino_masked", encoder="mini-identity", variant="plain")
    everything = rows.filter(concept=tables.ALL_CONCEPTS).row(0, named=True)
    assert (everything["n_empty"], everything["images"]) == (empty, 50)


def test_macro_and_micro_averages_are_those_of_the_other_scripts_scores(ours, theirs):
    scores, _ = theirs
    summary = summaries.summarise(ours, draws=100).filter(concept=tables.ALL_CONCEPTS)
    for row in summary.iter_rows(named=True):
        by_prompt: dict[tuple, list[float]] = {}
        for (name, metric, encoder, where), score in scores.items():
            real = not where.startswith("plain/")
            if (metric, encoder, real) == (row["metric"], row["encoder"], row["variant"] == "real_images"):
                by_prompt.setdefault((name, "" if real else where[6:8]), []).append(score)
        per_concept = [[np.mean(some) for key, some in by_prompt.items() if key[0] == name] for name in CONCEPTS]
        assert row["mean"] == pytest.approx(np.mean([np.mean(some) for some in per_concept]), abs=1e-5)
        assert row["micro"] == pytest.approx(
            np.mean([score for some in by_prompt.values() for score in some]), abs=1e-5
        )


def test_the_other_script_shares_no_code_with_ours():
    text = Path(recomputed_scores.__file__).read_text()
    assert "personalize_core" not in text.partition('"""')[2].partition('"""')[2]
    assert torch.get_num_threads() == 1
