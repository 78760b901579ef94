"""Images of a class noun, for prior preservation: sampled from the base model, or concept images put there by hand."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from personalize_core.concepts import concept_files
from personalize_core.files.atomic import is_up_to_date, write_json
from personalize_core.methods import method_class, recipe_class
from personalize_core.steps.events import Listener, Report, report_over, unheard
from personalize_core.steps.latents import CAPTIONS, encode, images_encoded
from personalize_core.steps.sampling import sample_images
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import (
    asked_for,
    asking_for_class_images,
    class_images_wanted,
    load_base,
    preprocessing_of,
)
from personalize_core.workspace.stamps.latents import (
    class_encoded_stamp,
    class_images_stamps,
    images_stamp,
    real_class_images_stamp,
)
from personalize_core.workspace.store import Store

TOGETHER = 8  # images sampled at once, of whatever size: whole batches are kept, and often few are wanted


def make_class_images(store: Store, class_noun: str, listener: Listener = unheard) -> Report:
    """Images of the class noun by the base model, for prior preservation: made once, shared by its concepts.

    As many as the most that a method of params.yaml asks for, and prepared in each way that such a method asks for.
    """
    started = time.monotonic()
    asking = sorted(asking_for_class_images(store), key=lambda method: asked_for(store, method), reverse=True)
    made = {method: class_images_for(store, class_noun, method, listener) for method in asking}
    metrics = {"images": float(class_images_wanted(store))}
    stamp = class_encoded_stamp(store, class_noun)
    return report_over(made, stamp, started, store.class_images(class_noun), metrics)


def class_images_for(store: Store, class_noun: str, method: str, listener: Listener) -> Report:
    """The first images of the folder that all methods share, as many as this method asks for, and their latents.

    Where there are too few, more are added. So the stamp covers how many the method asked for, and not how many there
    are: another method that wants more changes nothing for this one.
    """
    started = time.monotonic()
    wanted, recipe = asked_for(store, method), preprocessing_of(store, method).of_class_images
    folder = store.class_latents(class_noun, recipe.key)
    encoded, stamp = class_images_stamps(store, class_noun, recipe, wanted)
    with store.alone("class_images", store.class_images(class_noun).name):
        paths, sampled = _sample_class_images(store, class_noun, wanted, listener)
        enough = is_up_to_date(folder, encoded) and images_encoded(folder) >= wanted
        if not enough:
            what = f"encoding class images of {class_noun}, {recipe.key}"
            with making(store, folder, encoded) as new, store.device():
                encode(load_base(store), paths, recipe, new, what, listener)
    return Report(stamp, enough and not sampled, time.monotonic() - started, folder)


def class_images_are_there(store: Store, class_noun: str, method: str) -> bool:
    """Would `class_images_for` find all that the method asks for?"""
    wanted, recipe = asked_for(store, method), preprocessing_of(store, method).of_class_images
    folder, encoded = (
        store.class_latents(class_noun, recipe.key),
        class_images_stamps(store, class_noun, recipe, wanted),
    )
    images = store.class_images(class_noun)
    return (
        is_up_to_date(images, images_stamp(store, class_noun))
        and (images / _image(wanted - 1)).is_file()
        and is_up_to_date(folder, encoded[0])
        and images_encoded(folder) >= wanted
    )


def _sample_class_images(store: Store, class_noun: str, wanted: int, listener: Listener) -> tuple[list[Path], bool]:
    """The first images, and whether any had to be sampled.

    Always in whole batches, so that the first ones are the same bytes however many are wanted.
    """
    from personalize_core.concepts.concept import Concept
    from personalize_core.methods import BASELINE

    params, folder, stamp = store.params, store.class_images(class_noun), images_stamp(store, class_noun)
    names = [_image(image) for image in range(-(-wanted // TOGETHER) * TOGETHER)]
    kept = [name for name in names if (folder / name).is_file()] if is_up_to_date(folder, stamp) else []
    first = [folder / name for name in names[:wanted]]
    if len(kept) == len(names):
        return first, False
    # the prior prompt of DreamBooth's recipe; prompt index -1 keeps its noise apart from every grid's
    places = [(-1, image) for image in range(len(kept), len(names))]
    with making(store, folder, stamp) as new, store.device():
        base, kind = load_base(store), method_class(BASELINE)
        speaker = kind(recipe_class(BASELINE)(), base, Concept.named("class", class_noun))
        for name in kept:
            shutil.copyfile(folder / name, new / name)
        paths = [new / name for name in names[len(kept) :]]
        prompts, what = [speaker.say("a photo of {}")] * len(places), f"sampling class images of {class_noun}"
        together = [slice(start, start + TOGETHER) for start in range(0, len(paths), TOGETHER)]
        sample_images(params.class_images, params.seed, base, speaker, prompts, places, paths, what, listener, together)
    return first, True


def _image(image: int) -> str:
    return f"{image:03d}.png"


def encode_real_class_images(store: Store, class_noun: str, method: str, listener: Listener) -> Report:
    """Concept images of the class noun, put into data/regularization by hand: for prior preservation with real images.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    started = time.monotonic()
    recipe = preprocessing_of(store, method).of_class_images
    folder = store.real_class_latents(class_noun, recipe.key)
    captioned = concept_files.captioned(store.regularization(class_noun))
    stamp = real_class_images_stamp(store, class_noun, recipe)
    with store.alone("class_images", f"{store.class_images(class_noun).name}.real"):
        if is_up_to_date(folder, stamp):
            return Report(stamp, True, time.monotonic() - started, folder)
        with making(store, folder, stamp) as new, store.device():
            what = f"encoding concept images of {class_noun}, {recipe.key}"
            encode(load_base(store), [path for path, _ in captioned], recipe, new, what, listener)
            write_json(new / CAPTIONS, [caption for _, caption in captioned])
    return Report(stamp, False, time.monotonic() - started, folder)
