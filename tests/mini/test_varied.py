"""Stage `varied`: the U-Net sees each category in more outlines, and nothing else learns."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from personalize_core.mini import autoencoder, loop, tokenizer, varied
from personalize_core.mini.diffusion import cached_scene
from personalize_core.mini.export import WEIGHTS, export
from personalize_core.mini.named import reserved
from personalize_core.mini.names import HELD_OUT, MORE_VARIANTS, VARIANTS


def test_every_other_scene_has_further_drawings_and_none_the_concepts():
    scenes = [varied.scene_of(5, number) for number in range(600)]
    assert all(scenes[number] == cached_scene(5, number) for number in range(1, 600, 2))
    things = [thing for scene in scenes[::2] for thing in scene.things]
    drawn = {category: {t.design.sprite for t in things if t.category == category} for category in VARIANTS}
    assert drawn == {category: {*VARIANTS[category], *MORE_VARIANTS[category]} for category in VARIANTS}
    assert not any(sprite in drawn[category] for category, sprite in HELD_OUT.items())
    assert not any(reserved(thing.category, thing.design) for thing in things)
    bent = sum(any(thing.design.shape) for thing in things) / len(things)
    assert abs(bent - 0.7) < 4 * (0.7 * 0.3 / len(things)) ** 0.5


def test_the_unet_learns_alone_and_goes_on_where_it_was(tmp_path):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")

    def stage() -> Any:
        return varied.Varied(batch=2, work=tmp_path, scenes=8)

    def weights(of: Any) -> dict[str, dict[str, torch.Tensor]]:
        return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in of.modules.items()}

    def changed(before: Any, after: Any) -> set[str]:
        return {name for name in before if any(not torch.equal(v, after[name][k]) for k, v in before[name].items())}

    first = stage()
    before = weights(first)
    loop.train(first, 2, tmp_path / "once")
    assert changed(before, weights(first)) == {"network", "average"}
    loop.train(stage(), 2, tmp_path / "twice", until=1)
    second = stage()
    loop.train(second, 2, tmp_path / "twice")
    assert not changed(weights(first), weights(second))


def test_what_is_exported_has_the_tokenizer_it_was_trained_with_whatever_words_there_are_now(tmp_path, monkeypatch):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")
    stage: Any = varied.Varied(batch=2, work=tmp_path, scenes=8)
    loop.train(stage, 1, tmp_path)
    known = tokenizer.words()
    monkeypatch.setattr(tokenizer, "words", lambda: [word for word in known if word != "robot"])
    export(tmp_path, tmp_path / "weights", ["base"])
    export(tmp_path, tmp_path / "alone", ["unet"])
    for name in ("vocab.json", "merges.txt"):
        own = tmp_path / "weights" / "base" / "tokenizer" / name
        assert own.read_bytes() == (WEIGHTS / "base" / "tokenizer" / name).read_bytes()
    place = "base/unet/diffusion_pytorch_model.safetensors"
    learned = {name: value.half() for name, value in stage.average.module.state_dict().items()}
    for folder in ("weights", "alone"):
        written = load_file(tmp_path / folder / place)
        assert set(written) == set(learned) and all(
            torch.equal(value, learned[name]) for name, value in written.items()
        )
