"""The chain from a result down to the bytes behind it: what each link was made from, and whether that is still so.

It is read from manifests and from what lies beside them, and computes nothing but hashes.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from personalize_core import intake
from personalize_core.errors import InputError, listed
from personalize_core.files import Stamp, read_json, sha256
from personalize_core.lineage.differences import why_stale
from personalize_core.lineage.making import record_of
from personalize_core.lineage.records import DAMAGED, EDITED, file_problems, is_genuine, manifest_of
from personalize_core.methods import check_method, method_class
from personalize_core.models import identify
from personalize_core.steps.drawing import grid_stamp
from personalize_core.steps.recipes import preprocessing_of
from personalize_core.steps.scores import score_stamp
from personalize_core.steps.stamps import class_images_stamps, latents_stamp, pictures_stamp, train_stamp
from personalize_core.steps.training import PROOF
from personalize_core.store import REFERENCES, SCORES, Store

PICTURE = re.compile(r"(?P<prompt>\d\d+)_(?P<image>\d\d+)\.png")  # as store.picture_name has it
DEEP = 2  # so many tables of scores are followed to their photographs; of more, only their state is told
IS_GONE = "is gone"


@dataclass
class Link:
    """One thing of the chain."""

    what: str  # "picture", "grid", "artifact", ...
    path: str  # relative to the workspace, where it lies within
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # changed since, gone, stale
    making: dict[str, Any] = field(default_factory=dict)  # when, by which code and packages, on what
    again: str = ""  # the command that makes it again
    inputs: list[Link] = field(default_factory=list)

    def all_problems(self) -> list[str]:
        """Of the whole chain, each once."""
        own = [f"{self.what} {self.path}: {problem}" for problem in self.problems]
        return list(dict.fromkeys([*own, *(words for link in self.inputs for words in link.all_problems())]))


@dataclass(frozen=True)
class Rows:
    """Which rows of a table of scores; None: all of them."""

    concept: str | None = None
    method: str | None = None
    variant: str | None = None
    prompt: int | None = None
    image: int | None = None
    metric: str | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


def explain(store: Store, path: Path | None = None, rows: Rows | None = None, verify: bool = True) -> Link:
    """What is behind a file or a folder of data/, or behind the numbers of a table of scores.

    Args:
        path: if not given, the rows name a concept and a method, and the last that was made of them is meant.
        rows: numbers of the table at `path`, in place of the whole table.
        verify: read every file to tell whether it is as it was made, and find out what is stale.

    Raises:
        InputError: there is nothing there, or nothing there that a step makes.
    """
    rows = rows or Rows()
    path = _latest(store, rows) if path is None else _existing(store, path)
    own, parts = _placed(store, path)
    chain = Chain(own, verify)
    asks_for_numbers = any(value is not None for value in (rows.prompt, rows.image, rows.metric, rows.variant))
    if parts[0] in ("metrics", "comparison") and (asks_for_numbers or (parts[0] == "comparison" and rows)):
        return chain.numbers(path / SCORES if path.is_dir() else path, rows)
    return chain.link_of(path, parts)


@dataclass(frozen=True)
class Chain:
    """Links of one workspace, under one protocol, of one training."""

    store: Store
    verify: bool

    def link_of(self, path: Path, parts: Sequence[str]) -> Link:
        kind, *rest = parts
        known = {
            "concepts": (1, lambda concept: self.concept(concept, {})),
            "latents": (2, self.latents),
            "artifacts": (2, self.artifact),
            "grids": (2, self.grid),
            "metrics": (2, self.scores),
            "analyses": (2, self.analyses),
            "samples": (3, self.samples),
            "comparison": (0, self.comparison),
            "report": (0, self.report),
        }
        if kind == "class_images" and rest:
            folder = rest[0] if len(rest) == 1 or "." not in rest[0] else f"{rest[0]}/{rest[1]}"
            return self._file_in(self.class_images(self.store.data / kind / folder), path)
        if kind == "costs":
            return self._costs(path, rest)
        if kind not in known:
            raise InputError(f"{path} is nothing that a step makes: it was put there by hand, and is its own origin")
        depth, link = known[kind]
        if len(rest) < depth:
            below = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
            raise InputError(f"{path} holds several results; name one of them: {listed(below[:10])}")
        return self._file_in(link(*rest[:depth]), path)

    # What the steps make

    def concept(self, concept: str, recorded: Mapping[str, str]) -> Link:
        """recorded: the hashes of its files when what is explained was made from them."""
        folder = self.store.concept_folder(concept)
        link = Link("photographs", self._short(folder), again="put there by a person, with `personalize add`")
        if not folder.is_dir():
            link.problems.append(IS_GONE)
            return link
        try:
            link.facts = {"class_noun": self.store.concept(concept).class_noun, "sha256": intake.content(folder)}
        except (InputError, OSError) as error:
            link.problems.append(str(error))
            return link
        now = link.facts["sha256"]
        for name in sorted(recorded.keys() | now.keys() if recorded else ()):
            if recorded.get(name) != now.get(name):
                said = IS_GONE if name not in now else "is new" if name not in recorded else "has been changed since"
                link.problems.append(f"{name} {said}")
        return link

    def latents(self, concept: str, key: str) -> Link:
        folder = self.store.latents(concept, key)

        def now() -> Stamp:
            for method in self.store.params.method_names:
                if (recipe := preprocessing_of(self.store, method)).key == key:
                    return latents_stamp(self.store, concept, recipe)
            raise InputError("no method of params.yaml prepares photographs in this way any more")

        link, made_from = self._result("latents", folder, now, self._again(folder, "step encode-images"))
        link.facts |= _some(made_from, "preprocessing", "vae")
        link.inputs = [self.concept(concept, made_from.get("files", {}))]
        return link

    def class_images(self, folder: Path) -> Link:
        """The base model's pictures of a class noun, or what the autoencoder makes of them."""
        noun, _, key = folder.relative_to(self.store.data / "class_images").as_posix().partition("/")
        command, described = self._again(folder, "step class-images"), noun.replace("_", " ")
        if not key:
            link, made_from = self._result(
                "class images", folder, lambda: pictures_stamp(self.store, described), command
            )
            link.facts |= _some(made_from, "class_noun", "drawing", "seed", "base_model")
            return link
        noun, _, kind = noun.partition(".")
        link, made_from = self._result(f"latents of class images ({key})", folder, None, command)
        link.facts |= _some(made_from, "preprocessing", "vae")
        if kind == "latents":
            link.inputs = [self.class_images(self.store.data / "class_images" / noun)]
        elif files := made_from.get("files"):
            link.facts["sha256"] = {name: entry[0] for name, entry in files.items()}
        return link

    def artifact(self, method: str, concept: str) -> Link:
        folder = self.store.artifact(method, concept)
        described = _read(folder / "config.json")
        imported, repeat = described.get("imported"), self.store.repeat
        command = f"repeat {concept} -m {method} --times {repeat}" if repeat else f"train {concept} -m {method}"
        if imported:
            command = f"import {concept} {shlex.quote(imported)} -m {method}"
        now = None if imported else lambda: train_stamp(self.store, concept, method)
        link, made_from = self._result("artifact", folder, now, self._again(folder, command))
        link.facts |= _some(described, "method", "phrase", "config", "parameters", "seed", "imported")
        original = _of(made_from.get("again")) if repeat else made_from  # what it repeats says the rest
        link.facts |= _some(original, "precision", "gradient_checkpointing")
        if fixed := _read(folder / "fixed_batch.json"):
            link.facts["fixed_batch_loss"] = {"before": fixed["before"], "after": fixed["after"]}
        if proof := _read(folder / PROOF):
            link.facts["restored_draws_otherwise_by"] = proof["largest_difference"]
        if not link.making and described.get("versions"):
            link.making = {"packages": described["versions"]}
        if not described:
            return link
        if not imported:
            link.inputs = [self._latents_of(method, concept, _of(original.get("latents")))]
            if original.get("class_images"):
                link.inputs.append(self._class_images_of(method, described, original["class_images"]))
        link.inputs.append(self._base_model(described["base_model"]))
        return link

    def grid(self, method: str, concept: str) -> Link:
        folder = self.store.grid(method, concept)
        command = self._again(folder, f"evaluate {concept} -m {method}")
        now = lambda: grid_stamp(self.store, concept, method)  # noqa: E731
        link, made_from = self._result("grid", folder, now, command)
        described = _read(folder / "grid.json")
        link.facts |= _some(described, "protocol", "prompts", "templates", "images_per_prompt", "sampling", "seed")
        link.facts |= _some(made_from, "variants", "refinement", "precision")
        link.inputs = [self.artifact(method, concept)] if described else []
        return link

    def scores(self, method: str, concept: str, deep: bool = True) -> Link:
        folder = self.store.scores(method, concept)
        command = self._again(folder, "step score-references")
        if method != REFERENCES:
            command = self._again(folder, f"evaluate {concept} -m {method}")
        now = lambda: score_stamp(self.store, concept, method)  # noqa: E731
        link, made_from = self._result("scores", folder, now, command)
        link.facts |= _some(made_from, "encoders", "lists")
        if deep and not _gone(link):
            if method != REFERENCES:
                link.inputs = [self.grid(method, concept)]
            link.inputs.append(self.concept(concept, made_from.get("photographs", {})))
        return link

    def comparison(self) -> Link:
        from personalize_core.metrics import tables

        folder = self.store.comparison()
        link, made_from = self._result("comparison", folder, None, self._again(folder, "compare"))
        link.facts |= _some(made_from, "protocol", "trainings_left_out")
        if (folder / SCORES).is_file():
            table = tables.read_parquet(folder / SCORES)
            link.facts["scores"] = len(table)
            cells = table.select("method", "concept").unique().sort("method", "concept").rows()
            link.inputs = [self.scores(method, concept, deep=len(cells) <= DEEP) for method, concept in cells]
            for (method, concept), scores in zip(cells, link.inputs, strict=True):
                if made_from and scores.facts.get("stamp") not in made_from["tables"]:
                    link.problems.append(f"stale: the scores of {concept} by {method} have been made again since")
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
            link.inputs = [self.concept(concept, made_from.get("photographs", {}))]
        else:
            link.inputs = [self.grid(method, concept)]
        return link

    def samples(self, method: str, concept: str, request: str) -> Link:
        """Pictures that somebody asked for."""
        folder = self.store.samples(method, concept, request)
        maps = _read(folder / "heat_maps.json")
        asked = maps or _read(folder / "samples.json")
        cells = [tuple(cell) for cell in asked.get("cells", [[concept, method]])]
        prompts = asked.get("said") or asked.get("prompts") or [asked.get("prompt", "")]
        told = [" ".join(["--prompt", shlex.quote(prompt)]) for prompt in dict.fromkeys(prompts)]
        if "cells" in asked:
            told = [f"--prompt {shlex.quote(prompt)}" for prompt in asked["prompts"]]
            names = " ".join(f"{name}:{by}" for name, by in cells)
            command = f"together {names} {' '.join(told)} --images {asked['images']}"
        elif maps:
            command = f"heat-maps {concept} -m {method} {' '.join(told)} --image {maps['image']}"
        else:
            command = f"sample {concept} -m {method} {' '.join(told)} --images {asked.get('images')}"
            if variant := next((each.name for each in sorted(folder.glob("*")) if each.is_dir()), None):
                command += f" --variant {variant}"
        link, _ = self._result("heat maps" if maps else "pictures", folder, None, self._again(folder, command))
        link.facts |= _some(asked, "prompts", "prompt", "images", "image", "variant", "sampling", "seed")
        link.inputs = [self.artifact(by, name) for name, by in cells]
        return link

    # Numbers

    def numbers(self, path: Path, rows: Rows) -> Link:
        """Rows of a table of scores: each number with how it was measured, and the pictures that it is about."""
        import polars as pl

        from personalize_core.metrics import tables

        try:
            table = tables.read_parquet(path)
        except Exception as error:  # polars and pyarrow raise what they like
            raise InputError(f"{path} is no table of scores: {error}") from None
        columns = {"prompt": "prompt_index", "image": "image_index"}
        chosen = {columns.get(name, name): value for name, value in vars(rows).items() if value is not None}
        if lacking := chosen.keys() - set(table.columns):
            raise InputError(f"{path} is no table of scores: it has no column {listed(sorted(lacking))}")
        found = table.filter(*(pl.col(name) == value for name, value in chosen.items()))
        if found.is_empty():
            there = "; ".join(f"{name}: {listed(sorted(map(str, table[name].unique())))}" for name in chosen)
            raise InputError(f"{path} has no such row; it has {there}")
        link = Link("numbers", self._short(path), {"rows": len(found)})
        measured = ["metric", "encoder", "variant"]
        link.facts["scores"] = [
            {
                **dict(zip(measured, names, strict=True)),
                "mean": float(group["score"].to_numpy().mean()),
                "pictures": len(group),
                **_one_value(group, "encoder_sha256", "preprocessing", "text", "scaling", "pairing", "mask"),
            }
            for names, group in found.group_by(measured, maintain_order=True)
        ]
        images = found.select("image", "image_sha256").unique(maintain_order=True).rows()
        cells = found.select("method", "concept").unique(maintain_order=True).rows()
        if len(images) == 1 and cells[0][0] != REFERENCES:
            (name, digest), (method, concept) = images[0], cells[0]
            picture = self._file_in(self.grid(method, concept), self.store.root / name)
            if picture.facts.get("sha256") not in (None, digest):
                link.problems.append(f"{name} is another picture now than the one that was scored")
            link.inputs.append(picture)
        link.inputs += [self.scores(*cell, deep=len(cells) <= DEEP) for cell in cells]
        if self.store.comparison() in path.parents:
            compared = self.comparison()
            compared.inputs = []
            link.inputs.append(compared)
        return link

    # Inside

    def _result(
        self, what: str, folder: Path, now: Callable[[], Stamp] | None, again: str
    ) -> tuple[Link, dict[str, Any]]:
        """A folder of a step, and what it was made from as its manifest says; nothing where it says nothing.

        now: the stamp that it would have if it were made now.
        """
        link, manifest = Link(what, self._short(folder), again=again), manifest_of(folder)
        if not manifest:
            link.problems.append(DAMAGED if folder.is_dir() else IS_GONE)
            return link, {}
        made_from = manifest.get("made_from", {})
        link.facts = {"stamp": manifest["stamp"]}
        if sources := made_from.get("sources"):
            link.facts["sources"] = f"{sources['stamp']}, {len(sources['of'])} files"
        link.making = record_of(self.store, folder)
        if self.verify:
            link.problems += file_problems(folder, manifest)
            if made_from and not is_genuine(manifest):
                link.problems.append(EDITED)
            link.problems += _stale(manifest, now) if now else []
        return link, made_from

    def _file_in(self, link: Link, path: Path) -> Link:
        """A picture or another file of a result, before the result; the result itself if `path` is its folder."""
        folder = self.store.root / link.path
        if path == folder or not path.is_relative_to(folder) or link.what == "photographs" or path.is_dir():
            return link
        name = path.relative_to(folder).as_posix()
        entry = manifest_of(folder).get("files", {}).get(name)
        file = Link("picture" if path.suffix == ".png" else "file", self._short(path), inputs=[link])
        if not path.is_file():
            file.problems.append(IS_GONE)
            return file
        file.facts = {"sha256": sha256(path)}
        if entry is None:
            file.problems.append("no step has made this file: the manifest of its folder does not know it")
        elif entry["sha256"] != file.facts["sha256"]:
            file.problems.append("has been changed since it was made: its sha256 is another")
        described, place = _read(folder / "grid.json"), PICTURE.fullmatch(path.name)
        if place and described and "templates" in described:
            prompt, image = int(place["prompt"]), int(place["image"])
            file.facts |= {
                "prompt": described["templates"][prompt],
                "variant": path.parent.name,
                "noise": f"seed {described['seed']}, prompt {prompt}, image {image}",
            }
        return file

    def _latents_of(self, method: str, concept: str, made_from: Mapping[str, Any]) -> Link:
        key = made_from.get("preprocessing") or preprocessing_of(self.store, method).key
        link = self.latents(concept, key)
        if files := made_from.get("files"):
            link.inputs = [self.concept(concept, files)]
        return link

    def _class_images_of(self, method: str, described: Mapping[str, Any], recorded: Any) -> Link:
        noun, recipe = described["concept"]["class_noun"], preprocessing_of(self.store, method).of_class_images
        real = method_class(method).real_class_images(self.store.params.config(method))
        place = self.store.real_class_latents if real else self.store.class_latents
        link, made_from = self.class_images(place(noun, recipe.key)), _of(recorded)
        if wanted := made_from.get("images"):
            link.facts["images"] = wanted
            then, there = made_from.get("encoded"), link.facts.get("stamp")
            if there and isinstance(then, dict) and then["stamp"] != there:
                link.problems.append("others by now than those that were trained on")
            elif self.verify:
                then = {"stamp": recorded["stamp"], "made_from": made_from}
                link.problems += _stale(then, lambda: class_images_stamps(self.store, noun, recipe, wanted)[1])
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
        link = Link("measured", self._short(path), _read(path) if path.suffix == ".json" else {})
        if rest == ["costs.parquet"]:
            link.inputs = [self.comparison()]
        elif len(rest) == 3 and rest[0] != "making":
            method, concept, name = rest
            check_method(method)
            link.inputs = [(self.grid if name == "drawing.json" else self.artifact)(method, concept)]
        else:
            raise InputError(f"{path} tells how something came to be; ask for that thing itself")
        return link

    def _again(self, folder: Path, command: str) -> str:
        """Removed first, for a step keeps what it takes for current."""
        under = f" --protocol {self.store.protocol}" if self.store.protocol else ""
        return f"rm -r {shlex.quote(self._short(folder))} && personalize{under} {command}"

    def _short(self, path: Path) -> str:
        return path.relative_to(self.store.root).as_posix() if path.is_relative_to(self.store.root) else str(path)


def _existing(store: Store, path: Path) -> Path:
    """Where it lies, links left as they are: DVC may have put some there."""
    for place in (Path(os.path.abspath(path)), store.root / path):
        if place.exists():
            return place
    raise InputError(f"there is no {path}; name a file or folder of {store.data}, as it is shown by `personalize run`")


def _latest(store: Store, rows: Rows) -> Path:
    if rows.concept is None or rows.method is None:
        raise InputError("name a file or folder of data/, or a concept and a method with --concept and --method")
    check_method(rows.method)
    store.concept(rows.concept)
    places = [place(rows.method, rows.concept) for place in (store.scores, store.grid, store.artifact)]
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f"nothing has been made of {rows.concept!r} by {rows.method}; `personalize run` makes it")


def _placed(store: Store, path: Path) -> tuple[Store, list[str]]:
    """The workspace as it was for this path, by protocol and repeat; and the path within."""
    if not path.is_relative_to(store.data) or path == store.data:
        raise InputError(f"{path} is not in {store.data}; what steps make lies there")
    parts, own = list(path.relative_to(store.data).parts), Store(store.root)
    if parts[0] == "repeats" and len(parts) > 2 and parts[1].isdigit():
        own, parts = own.again(int(parts[1])), parts[2:]
    if parts[0] == "under" and len(parts) > 2:
        own, parts = replace(own, protocol=parts[1]), parts[2:]
    if parts[0] in ("repeats", "under"):
        raise InputError(f"{path} holds several results; name one of them")
    return own, parts


def _stale(manifest: Mapping[str, Any], now: Callable[[], Stamp]) -> list[str]:
    try:
        why = why_stale(manifest, now())
    except (InputError, OSError) as error:
        return [f"cannot be made again as things are: {error}"]
    return [f"stale: {why}"] if why else []


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


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


def _one_value(group: Any, *names: str) -> dict[str, Any]:
    """What is the same in all rows."""
    return {name: group[name][0] for name in names if group[name].n_unique() == 1 and group[name][0] is not None}


def _gone(link: Link) -> bool:
    return link.problems == [IS_GONE]
