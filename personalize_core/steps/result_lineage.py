"""The links of the chain: what each result was made from, and whether that is still so.

It is read from manifests and from what lies beside them, and computes nothing but hashes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.artifacts.description import imported
from personalize_core.base_model.loading import identify
from personalize_core.concepts import concept_files
from personalize_core.concepts.concept import SLOT
from personalize_core.errors import InputError, listed
from personalize_core.files.atomic import read_record, record_of_result
from personalize_core.files.stamps import Stamp, sha256
from personalize_core.methods import check_method, method_of
from personalize_core.sampling.grid import DESCRIPTION, IMAGE, located
from personalize_core.steps.training import PROOF
from personalize_core.workspace import commands
from personalize_core.workspace.lineage.differences import why_stale
from personalize_core.workspace.lineage.link import Link
from personalize_core.workspace.lineage.records import (
    DAMAGED,
    EDITED,
    as_written,
    file_problems,
    is_genuine,
    manifest_of,
)
from personalize_core.workspace.recipes import content_trained_on, preprocessing_of
from personalize_core.workspace.stamps.latents import (
    class_images_stamps,
    images_stamp,
    latents_stamp,
    real_class_images_stamp,
)
from personalize_core.workspace.stamps.sampling import sampling_inputs
from personalize_core.workspace.stamps.scoring import score_stamp
from personalize_core.workspace.stamps.training import train_stamp
from personalize_core.workspace.store import REFERENCES, SCORES, Store, is_label

if TYPE_CHECKING:
    from personalize_core.concepts.preprocessing import Preprocessing

DEEP = 2  # so many tables of scores are followed to their concept images; of more, only their state is told
IS_GONE = "is gone"


@dataclass(frozen=True)
class ResultLineage:
    """Links of one workspace, under one protocol, of one training."""

    store: Store
    verify: bool

    def link_of(self, path: Path, parts: Sequence[str]) -> Link:
        """What lies at `path`; within data/, protocol and repeat aside, that is `parts`.

        Raises:
            InputError: no step makes such a thing, or it holds several results.
        """
        kind, *rest = parts
        if kind == "costs":
            return self._costs(path, rest)
        encoded = kind == "class_images" and rest and "." in rest[0]  # no class noun has a dot
        known = {
            "concepts": (1, self.concept),
            "latents": (2, self.latents),
            "class_images": (2, self.class_latents) if encoded else (1, self.class_images),
            "artifacts": (2, self.artifact),
            "grids": (2, self.grid),
            "metrics": (2, self.scores),
            "analyses": (2, self.analyses),
            "samples": (3, self.samples),
            "agreement": (0, self.agreement),
            "comparison": (0, self.comparison),
            "report": (0, self.report),
        }
        if kind not in known:
            raise InputError(f"{path} is nothing that a step makes: it was put there by hand, and is its own origin")
        depth, link = known[kind]
        if len(rest) < depth:
            below = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
            raise InputError(f"{path} holds several results; name one of them: {listed(below[:10])}")
        return self.file_in(link(*rest[:depth]), path)

    # What the steps make

    def concept(self, concept: str, recorded: Mapping[str, str] | None = None, for_training: bool = False) -> Link:
        """recorded: the hashes of its files when what is explained was made from them, where that is known.

        for_training: only of the files that training reads, without the images that are held out.
        """
        folder = self.store.concept_folder(concept)
        link = Link("concept images", self.short(folder), again="put there by a person, with `personalize add`")
        if not folder.is_dir():
            link.problems.append(IS_GONE)
            return link
        try:
            content = content_trained_on(self.store, concept) if for_training else concept_files.content(folder)
            link.facts = {"class_noun": self.store.concept(concept).class_noun, "sha256": content}
        except (InputError, OSError) as error:
            link.problems.append(str(error))
            return link
        now = link.facts["sha256"]
        then = recorded or now
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                said = IS_GONE if name not in now else "is new" if name not in then else "has been changed since"
                link.problems.append(f"{name} {said}")
        return link

    def latents(self, concept: str, key: str) -> Link:
        folder = self.store.latents(concept, key)

        def now() -> Stamp:
            return latents_stamp(self.store, concept, self._recipe(key, lambda recipe: recipe))

        link, made_from = self._result("latents", folder, now, self._again(folder, "step encode-images"))
        link.facts |= _some(made_from, "preprocessing", "vae")
        link.inputs = [self.concept(concept, made_from.get("files"), for_training=True)]
        return link

    def class_images(self, noun: str) -> Link:
        """The base model's images of a class noun, as folders have it."""
        folder = self.store.class_images(noun)
        command = self._again(folder, "step class-images")
        link, made_from = self._result("class images", folder, lambda: images_stamp(self.store, _noun(folder)), command)
        link.facts |= _some(made_from, "class_noun", "sampling", "seed", "base_model", "compile", "image_size")
        return link

    def class_latents(self, place: str, key: str) -> Link:
        """What the autoencoder makes of images of a class noun: NOUN.latents; of concept images of it: NOUN.real."""
        folder, (noun, _, kind) = self.store.data / "class_images" / place / key, place.partition(".")

        def now() -> Stamp:
            recipe = self._recipe(key, lambda recipe: recipe.of_class_images)
            if kind == "real":
                return real_class_images_stamp(self.store, noun, recipe)
            return class_images_stamps(self.store, _noun(self.store.class_images(noun)), recipe, wanted=1)[0]

        command = self._again(folder, "step class-images")
        link, made_from = self._result(f"latents of class images ({key})", folder, now, command)
        link.facts |= _some(made_from, "preprocessing", "vae")
        if kind == "latents":
            link.inputs = [self.class_images(noun)]
        elif files := made_from.get("files"):
            link.facts["sha256"] = {name: entry[0] for name, entry in files.items()}
        return link

    def artifact(self, method: str, concept: str) -> Link:
        folder = self.store.artifact(method, concept)
        described = as_written(folder, "config.json")
        foreign = imported(folder)
        now = None if foreign else lambda: train_stamp(self.store, concept, method)
        again = self._removed_first(folder, commands.artifact(self.store, concept, method))
        link, made_from = self._result("artifact", folder, now, again)
        link.facts |= _some(described, "method", "phrase", "config", "parameters", "seed", "imported")
        original = _of(made_from.get("again")) if self.store.repeat else made_from  # what it repeats says the rest
        link.facts |= _some(original, "precision", "gradient_checkpointing", "optimizer", "compile", "image_size")
        if loss := _some(as_written(folder, "fixed_batch.json"), "before", "after"):
            link.facts["fixed_batch_loss"] = loss
        if proof := _some(as_written(folder, PROOF), "largest_difference"):
            link.facts["restored_samples_otherwise_by"] = proof["largest_difference"]
        if not link.making and described.get("versions"):
            link.making = {"packages": described["versions"]}
        if not described.keys() >= {"concept", "base_model"}:  # damaged, which is said among its files
            return link
        if not foreign:
            link.inputs = [self._latents_of(method, concept, _of(original.get("latents")))]
            if class_images := original.get("class_images"):
                link.inputs.append(self._class_images_of(described["concept"]["class_noun"], class_images))
        link.inputs.append(self._base_model(described["base_model"]))
        return link

    def external_images(self, label: str, concept: str) -> Link:
        """The list of an external column's images, which lie where another program put them."""
        folder = self.store.grid(label, concept)
        again = self._removed_first(folder, commands.grid(self.store, concept, label))
        link, _ = self._result("external images", folder, None, again)
        described = as_written(folder, DESCRIPTION)
        link.facts |= _some(described, "external", "templates") | {"images": len(described.get("images", ()))}
        images = located(folder, described, self.store.root) if self.verify and "images" in described else []
        for image, told in zip(images, described.get("images", ()), strict=False):
            if not image.path.is_file():
                link.problems.append(f"{image.path} {IS_GONE}")
            elif sha256(image.path) != told["sha256"]:
                link.problems.append(f"{image.path} has been changed since it was scored")
        return link

    def grid(self, method: str, concept: str) -> Link:
        if is_label(method):
            return self.external_images(method, concept)
        folder = self.store.grid(method, concept)
        again = self._removed_first(folder, commands.grid(self.store, concept, method))
        now = lambda: sampling_inputs(self.store, concept, method).stamp  # noqa: E731
        link, made_from = self._result("grid", folder, now, again)
        described = as_written(folder, DESCRIPTION)
        link.facts |= _some(described, "protocol", "prompts", "templates", "images_per_prompt", "sampling", "seed")
        link.facts |= _some(made_from, "variants", "refinement", "guidance", "precision", "compile", "image_size")
        link.inputs = [self.artifact(method, concept)] if described else []
        return link

    def scores(self, method: str, concept: str, deep: bool = True) -> Link:
        folder = self.store.scores(method, concept)
        again = self._removed_first(folder, commands.scores(self.store, concept, method))
        now = lambda: score_stamp(self.store, concept, method)  # noqa: E731
        link, made_from = self._result("scores", folder, now, again)
        link.facts |= _some(made_from, "encoders", "lists")
        if deep and not _gone(link):
            if method != REFERENCES:
                link.inputs = [self.grid(method, concept)]
            link.inputs.append(self.concept(concept, made_from.get("concept_images")))
        return link

    def comparison(self) -> Link:
        from personalize_core.metrics import parquet

        folder = self.store.comparison()
        link, made_from = self._result("comparison", folder, None, self._again(folder, "compare"))
        link.facts |= _some(made_from, "protocol", "trainings_left_out")
        if (folder / SCORES).is_file():
            table = parquet.read_parquet(folder / SCORES)
            link.facts["scores"] = len(table)
            cells = table.select("method", "concept").unique().sort("method", "concept").rows()
            link.inputs = [self.scores(method, concept, deep=len(cells) <= DEEP) for method, concept in cells]
            for (method, concept), scores in zip(cells, link.inputs, strict=True):
                if made_from and scores.facts.get("stamp") not in made_from.get("tables", []):
                    link.problems.append(f"stale: the scores of {concept} by {method} have been made again since")
        return link

    def agreement(self) -> Link:
        """Of metrics with the answers of a study, which lie where the person who ran it keeps them."""
        folder = self.store.agreement()
        link, _ = self._result("agreement with people", folder, None, self._again(folder, "agreement ANSWERS"))
        link.facts |= _some(as_written(folder, "agreement.json"), "study", "title", "raters", "answers", "automated")
        return link

    def report(self) -> Link:
        folder = self.store.report()
        link, made_from = self._result("report", folder, None, self._again(folder, "report"))
        compared = self.comparison()
        if made_from and made_from.get("comparison") != compared.facts.get("stamp"):
            link.problems.append("stale: the comparison has been made again since")
        link.inputs = [compared]
        return link

    def analyses(self, method: str, concept: str) -> Link:
        folder = self.store.analyses(method, concept)
        if method == "class_nouns":
            command = f"suggest-class {concept}"
        elif method == "together":
            command = f"analyse {concept}"
        else:
            command = f"analyse {concept} -m {method}"
        link, made_from = self._result("analyses", folder, None, self._again(folder, command))
        link.facts |= _some(made_from, "encoders", "encoder", "variants", "sampling", "seed")
        if method == "together":
            link.inputs = [self.analyses(name, concept) for name in made_from.get("analyses", {})]
        elif method == "class_nouns":
            link.inputs = [self.concept(concept, made_from.get("concept_images"))]
        else:
            link.inputs = [self.grid(method, concept)]
        return link

    def samples(self, method: str, concept: str, request: str) -> Link:
        """Images that somebody asked for, or heat maps."""
        folder = self.store.samples(method, concept, request)
        maps = as_written(folder, "heat_maps.json")
        asked = maps or as_written(folder, "samples.json")
        what, command = "heat maps" if maps else "images", self._asking(method, concept, folder, asked)
        link, _ = self._result(what, folder, None, self._again(folder, command) if command else "")
        link.facts |= _some(asked, "prompts", "prompt", "images", "image", "variant", "sampling", "seed", "image_size")
        if asked:
            link.inputs = [self.artifact(by, name) for name, by in asked.get("cells", [[concept, method]])]
        return link

    def _asking(self, method: str, concept: str, folder: Path, asked: Mapping[str, Any]) -> str:
        """The command that asks for these images; "" where nothing says what was asked for."""
        if "cells" in asked:
            cells = " ".join(f"{name}:{by}" for name, by in asked["cells"])
            wanted = f"{cells} {_prompts(asked['prompts'])} --images {asked['images']}"
            return f"interpolate {wanted} --points {asked['points']}" if "points" in asked else f"compose {wanted}"
        placeholder = f"<{concept}>"
        with suppress(InputError):  # the concept is gone: then by the placeholder that it had unless somebody chose one
            placeholder = self.store.concept(concept).placeholder
        if "template" in asked:
            prompts = _prompts([asked["template"].replace(SLOT, placeholder)])
            nouns = "".join(f" --noun {shlex.quote(noun)}" for noun in asked.get("nouns", []))
            return f"heat-maps {concept} -m {method} {prompts} --image {asked['image']}{nouns}"
        if "templates" in asked:
            prompts = _prompts([template.replace(SLOT, placeholder) for template in asked["templates"]])
            variant = next((f" --variant {each.name}" for each in sorted(folder.glob("*")) if each.is_dir()), "")
            return f"sample {concept} -m {method} {prompts} --images {asked['images']}{variant}"
        return ""

    # Inside

    def _result(
        self, what: str, folder: Path, now: Callable[[], Stamp] | None, again: str
    ) -> tuple[Link, dict[str, Any]]:
        """A folder of a step, and what it was made from as its manifest says; nothing where it says nothing.

        now: the stamp that it would have if it were made now.
        """
        link, manifest = Link(what, self.short(folder), again=again), manifest_of(folder)
        if not manifest:
            link.problems.append(DAMAGED if folder.is_dir() else IS_GONE)
            return link, {}
        made_from = manifest.get("made_from", {})
        link.facts = {"stamp": manifest["stamp"]}
        if made_from and not is_genuine(manifest):  # what stands there may be of any kind
            link.problems.append(EDITED)
            made_from = {}
        if sources := made_from.get("sources"):
            link.facts["sources"] = f"{sources['stamp']}, {len(sources['of'])} files"
        link.making = record_of_result(self.store.making(folder), folder)
        if self.verify:
            link.problems += file_problems(folder, manifest)
            link.problems += _stale(manifest, now) if now else []
        return link, made_from

    def file_in(self, link: Link, path: Path) -> Link:
        """An image or another file of a result, before the result; the result itself if `path` is its folder."""
        folder = self.store.root / link.path
        if path == folder or not path.is_relative_to(folder) or link.what == "concept images" or path.is_dir():
            return link
        name = path.relative_to(folder).as_posix()
        entry = manifest_of(folder).get("files", {}).get(name)
        file = Link("image" if path.suffix == ".png" else "file", self.short(path), inputs=[link])
        if not path.is_file():
            file.problems.append(IS_GONE)
            return file
        file.facts = {"sha256": sha256(path)}
        if entry is None:
            file.problems.append("no step has made this file: the manifest of its folder does not know it")
        elif entry["sha256"] != file.facts["sha256"]:
            file.problems.append("has been changed since it was made: its sha256 is another")
        described, place = as_written(folder, DESCRIPTION), IMAGE.fullmatch(path.name)
        if entry and place and "templates" in described:
            prompt, image = int(place["prompt"]), int(place["image"])
            file.facts |= {
                "prompt": described["templates"][prompt],
                "variant": path.parent.name,
                "noise": f"seed {described['seed']}, prompt {prompt}, image {image}",
            }
        return file

    def _recipe(self, key: str, of: Callable[[Preprocessing], Preprocessing]) -> Preprocessing:
        """The way in which a method of params.yaml prepares images that has this key.

        Raises:
            InputError: none has.
        """
        recipes = (of(preprocessing_of(self.store, method)) for method in self.store.params.method_names)
        if recipe := next((recipe for recipe in recipes if recipe.key == key), None):
            return recipe
        raise InputError("no method of params.yaml prepares concept images in this way any more")

    def _latents_of(self, method: str, concept: str, recorded: Mapping[str, Any]) -> Link:
        """recorded: what the latents that an artifact was trained on were made from, where that is known."""
        link = self.latents(concept, recorded.get("preprocessing") or preprocessing_of(self.store, method).key)
        if files := recorded.get("files"):
            link.inputs = [self.concept(concept, files, for_training=True)]
        return link

    def _class_images_of(self, noun: str, recorded: Mapping[str, Any]) -> Link:
        """recorded: the stamp of those that an artifact was trained on, spelled out."""
        trained_on = _of(recorded)  # the first images, so many of them; or concept images, all of them
        encoded = trained_on.get("encoded", recorded)
        place = self.store.real_class_latents if "files" in trained_on else self.store.class_latents
        folder = place(noun, _of(encoded)["preprocessing"])
        link = self.class_latents(folder.parent.name, folder.name)
        link.facts |= _some(trained_on, "images")
        if link.facts.get("stamp", encoded["stamp"]) != encoded["stamp"]:
            link.problems.append("others by now than those that were trained on")
        return link

    def _base_model(self, described: Mapping[str, Any]) -> Link:
        link = Link("base model", described["name"], dict(described), again="comes as it is")
        if self.verify:
            try:
                about = identify(described["name"])
                link.facts |= {"source": about.source, "parts": {part: str(digest) for part, digest in about.hashes}}
                if about.weights_hash != described["weights_hash"]:
                    link.problems.append(f"its weights are others by now: {about.weights_hash}")
            except (InputError, OSError) as error:
                link.problems.append(str(error))
        return link

    def _costs(self, path: Path, rest: Sequence[str]) -> Link:
        """What was measured is made from nothing; it was measured while something was made."""
        link = Link("measured", self.short(path), read_record(path) if path.suffix == ".json" else {})
        if rest == ["costs.parquet"]:
            link.inputs = [self.comparison()]
        elif len(rest) == 3 and rest[0] != "making":
            method, concept, name = rest
            if name == "scoring.json":  # of real images and of images made elsewhere too
                link.inputs = [self.scores(method, concept)]
            else:
                check_method(method_of(method))
                link.inputs = [(self.grid if name == "sampling.json" else self.artifact)(method, concept)]
        else:
            raise InputError(f"{path} tells how something came to be; ask for that thing itself")
        return link

    def _again(self, folder: Path, command: str) -> str:
        return self._removed_first(folder, commands.personalize(self.store, command))

    def _removed_first(self, folder: Path, command: str) -> str:
        """For a step keeps what it takes for current."""
        return f"rm -r {shlex.quote(self.short(folder))} && {command}"

    def short(self, path: Path) -> str:
        return path.relative_to(self.store.root).as_posix() if path.is_relative_to(self.store.root) else str(path)


def _stale(manifest: Mapping[str, Any], now: Callable[[], Stamp]) -> list[str]:
    try:
        why = why_stale(manifest, now())
    except (InputError, OSError) as error:
        return [f"cannot be made again as things are: {error}"]
    return [f"stale: {why}"] if why else []


def _noun(folder: Path) -> str:
    """The class noun that images are of; their folder's name, where nothing says it better, has no capitals."""
    return manifest_of(folder).get("made_from", {}).get("class_noun", folder.name.replace("_", " "))


def _prompts(prompts: Sequence[str]) -> str:
    return " ".join(f"--prompt {shlex.quote(prompt)}" for prompt in prompts)


def _of(recorded: Any) -> dict[str, Any]:
    """What a recorded stamp is of; nothing where only the stamp was recorded."""
    return recorded["of"] if isinstance(recorded, dict) else {}


def _some(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those that are there; of a stamp, the stamp alone."""
    found = {name: values[name] for name in names if values.get(name) is not None}
    return {
        name: value["stamp"] if isinstance(value, dict) and value.keys() == {"stamp", "of"} else value
        for name, value in found.items()
    }


def _gone(link: Link) -> bool:
    return link.problems == [IS_GONE]
