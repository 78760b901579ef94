"""Images are written while the next are sampled: the same files, whole or not at all, and failures are heard of."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from personalize_core.files.atomic import whole_folder
from personalize_core.sampling import sampler
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.steps import sampling
from personalize_core.steps.events import Event
from personalize_core.workspace.sampling_settings import SamplerSettings
from tests.conftest import tiny_base, unpersonalized

HOW = SamplerSettings(sampler="ddim", steps=2, guidance=3.0)
PLACES = [(prompt, image) for prompt in range(2) for image in range(2)]
PROMPTS = [f"a red {('dog', 'mug')[prompt]}" for prompt, _ in PLACES]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(sampler, "at_once", lambda base: 1)


def sampled_into(folder: Path, concept, listener: Any = lambda event: None) -> list[Path]:
    base, paths = tiny_base(), [folder / f"{prompt}" / f"{image}.png" for prompt, image in PLACES]
    method = unpersonalized(base, concept)
    sampling.sample_images(HOW, 0, base, method, PROMPTS, PLACES, paths, "sampling", listener)
    return paths


def test_each_image_lies_in_its_own_file(tmp_path, concept):
    events: list[Event] = []
    paths, base = sampled_into(tmp_path, concept, events.append), tiny_base()
    for path, prompt, place in zip(paths, PROMPTS, PLACES, strict=True):
        noise, ddim = initial_noise(base, 0, [place]), make_sampler("ddim", base)
        alone = base.decode(sample(unpersonalized(base, concept), base, [prompt], noise, ddim, 2, 3.0))
        assert np.array_equal(np.asarray(Image.open(path)), alone[0].numpy())
    assert [(event.done, event.total) for event in events] == [(done, 8) for done in range(1, 9)]


def test_the_next_image_is_sampled_while_one_is_written(tmp_path, concept, monkeypatch):
    sampled_next, waited, write = threading.Event(), [], sampling._write_images

    def write_slowly(pixels, paths) -> None:
        waited.append(sampled_next.wait(timeout=60))
        write(pixels, paths)

    def listen(event: Event) -> None:
        if event.done == 4:  # both steps of the second image
            sampled_next.set()

    monkeypatch.setattr(sampling, "_write_images", write_slowly)
    paths = sampled_into(tmp_path, concept, listen)
    assert waited == [True] * 4 and all(path.is_file() for path in paths)


@pytest.mark.parametrize("failing", [0, 3])
def test_a_full_disk_is_heard_of_and_leaves_no_folder(failing, tmp_path, concept, monkeypatch):
    saved, save = [], Image.Image.save

    def fill(image, path, *arguments) -> None:
        saved.append(path)
        if len(saved) == failing + 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(image, path, *arguments)

    monkeypatch.setattr(Image.Image, "save", fill)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "grid", "stamp") as new:
        sampled_into(new, concept)
    assert list(tmp_path.iterdir()) == [] and len(saved) == failing + 1


def test_an_interruption_ends_it_once_what_is_being_written_is_done_and_leaves_no_folder(
    tmp_path, concept, monkeypatch
):
    threads, write = [], sampling._write_images

    def noted(pixels, paths) -> None:
        threads.append(threading.current_thread())
        write(pixels, paths)

    def interrupt(event: Event) -> None:
        if event.done == 3:  # while the first image may be being written
            raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "_write_images", noted)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "grid", "stamp") as new:
        sampled_into(new, concept, interrupt)
    assert list(tmp_path.iterdir()) == []
    assert len(threads) == 1 and not threads[0].is_alive()
