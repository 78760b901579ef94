"""Artifacts to and from other programs."""

from __future__ import annotations

import time
from pathlib import Path

from personalize_core.base_model.loading import identify
from personalize_core.errors import InputError
from personalize_core.files.atomic import new_folder, whole_folder, write_json
from personalize_core.files.outside import is_there, refuse_pickle
from personalize_core.files.stamps import sha256, stamp_of
from personalize_core.methods import method_class
from personalize_core.steps.events import Report
from personalize_core.steps.training import PROOF, trained_report
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import base_for_a_moment, load_base
from personalize_core.workspace.stamps.made import artifact_stamp
from personalize_core.workspace.store import Store


def export(store: Store, concept: str, method: str, to: Path) -> Report:
    """An artifact in the format that stock diffusers loads, with a README.md that says how.

    Raises:
        InputError: there is no artifact, no such format, or `to` exists.
    """
    from personalize_core.artifacts.saving import restore

    store.params.check_method(method)
    started = time.monotonic()
    if is_there(to):
        raise InputError(f"{to} exists already; name a folder that does not, so that nothing is overwritten")
    stamp, artifact = artifact_stamp(store, concept, method), store.artifact(method, concept)
    with base_for_a_moment(store) as base, whole_folder(to, stamp) as new:
        how = restore(artifact, base, method).export(base, new)
        (new / "README.md").write_text(f"{concept}, learned by {method} on {base.name} ({base.revision}).\n\n{how}\n")
    files = {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()}
    return Report(stamp, False, time.monotonic() - started, to, {}, files)


def export_peft(store: Store, to: Path) -> Report:
    """The last comparison as result files of PEFT's benchmark, a JSON file per variant and concept.

    Raises:
        InputError: nothing has been compared, or `to` exists.
    """
    from personalize_core.report import peft_results

    started = time.monotonic()
    if is_there(to):
        raise InputError(f"{to} exists already; name a folder that does not, so that nothing is overwritten")
    results = peft_results.results(store)
    with new_folder(to) as new:  # without a manifest: PEFT's programs read every JSON file of the folder
        for name, result in results.items():
            write_json(new / name, result)
    files = {name: to / name for name in sorted(results)}
    return Report(stamp_of(results), False, time.monotonic() - started, to, {}, files)


def import_artifact(store: Store, concept: str, method: str, source: Path) -> Report:
    """What another program learned, as an artifact: sampled and scored like any, and kept until its folder is removed.

    It is proved as a trained one is: it appears only after a fresh process has sampled with it what this one samples.

    Args:
        source: a file or folder in the format that `export` writes for the method.

    Raises:
        InputError: it cannot be read, does not fit the base model, makes it sample values that are no numbers, or
            there is an artifact already.
        ProofFailed: the artifact, read from disk, samples something else.
    """
    from personalize_core.artifacts import proof, saving
    from personalize_core.methods.shared.interchange import read_foreign
    from personalize_core.training import training_log

    store.params.check_method(method)
    started, folder = time.monotonic(), store.artifact(method, concept)
    config, described = store.params.config(method), store.concept(concept)
    if not is_there(source) or not source.exists():
        raise InputError(f"{source} does not exist")
    refuse_pickle(source)
    with store.alone("artifact", method, concept), store.device():
        base = load_base(store)
        base.tokenizer.check_class_noun(described)
        learner = read_foreign(method_class(method), config, base, described, source)
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        stamp = stamp_of(
            {
                "imported": {path.relative_to(source.parent).as_posix(): sha256(path) for path in files},
                "method": method,
                "concept": vars(described),
                "config": repr(config),
                "base_model": identify(store.params.base_model).weights_hash,
            }
        )
        learner = learner.requires_grad_(False).eval().to(base.device)
        with proof.FreshProcess(base) as fresh:
            if not (shown := proof.evidence(learner, base)).latents.isfinite().all():
                raise InputError(
                    f"{source} was read, but with it {base.name} samples values that are infinite or not a number; it "
                    "was trained for another base model, or damaged"
                )
            if folder.exists():  # the last reason: nobody should remove it for a file that is refused then
                raise InputError(
                    f"{method} has learned {concept!r} already; to import {source} in its place, remove {folder}, or "
                    f"move it out of {folder.parent}, and import again"
                )
            with making(store, folder, stamp) as new:
                saving.save(new, method, learner, base, seed=None, imported=source.name)
                training_log.write([], new)
                fresh.restore(new)
                write_json(new / PROOF, proof.compare(shown, fresh.evidence(), base))
    return trained_report(stamp, False, started, folder)
