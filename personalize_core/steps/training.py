"""Latents to an artifact: what one method learns about one concept, and the proof that it can be read again."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.files.atomic import is_up_to_date, read_json, write_json
from personalize_core.methods import check_method, method_class, method_of
from personalize_core.randomness import seed_for
from personalize_core.steps.class_images import class_images_for, encode_real_class_images
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.latents import encode_concept, read_latents
from personalize_core.training.run_costs import TimedCheckpoints
from personalize_core.workspace.dependencies import check_artifact, manifest_stamp, train_stamp
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import load_base, preprocessing_of, recipe_of
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel
    from personalize_core.methods.interface import Method

LOSS_CURVE = "loss.png"
PROOF = "proof.json"  # beside the weights: a fresh process drew with them what the trainer drew


def train(store: Store, concept: str, method: str, listener: Listener = unheard) -> Report:
    """What one method learns about one concept; with its losses, and the loss on a fixed batch before and after.

    A run that was cut off goes on from its last checkpoint, to the same result. What was learned appears only after a
    fresh process has drawn with it just what the trainer draws. What was imported is kept as it is.

    Raises:
        InputError: the concept, the method or its recipe is not usable, or what was imported is not of this method
            and base model; nothing has been computed then.
        ProofFailed: the artifact, read from disk, draws something else.
    """
    check_method(method)
    started = time.monotonic()
    folder, described = store.artifact(method, concept), store.concept(concept)
    if imported(folder):
        check_artifact(store, concept, method)
        again = f"import it again, after removing {folder}"
        return trained_report(manifest_stamp(folder, f"{folder} has no manifest", again), True, started, folder)
    config = recipe_of(store, method)
    stamp = train_stamp(store, concept, method)  # first: what changes meanwhile then counts as new the next time
    encode_concept(store, concept, preprocessing_of(store, method), listener)
    prior = None
    if config.class_images_needed:
        class_images = encode_real_class_images if config.real_class_images else class_images_for
        prior = class_images(store, described.class_noun, method, listener).path
    checkpoints = TimedCheckpoints(store.checkpoints(method, concept), stamp)
    with store.alone("artifact", method, concept):
        if is_up_to_date(folder, stamp):
            checkpoints.clear()  # where the run that made it was killed before it could
            return trained_report(stamp, True, started, folder)
        base = load_base(store)
        base.tokenizer.check_class_noun(described)
        with making(store, folder, stamp) as new, store.device():
            taken = _train_into(new, store, base, concept, method, prior, checkpoints, listener)
            if taken:  # while the artifact is still to appear: a run killed just after it would never write them
                write_json(store.training_costs(method, concept), {"stamp": stamp, **taken})
        checkpoints.clear()
    return trained_report(stamp, False, started, folder)


def untrained(store: Store, base: BaseModel, concept: str, method: str) -> Method:
    """The method as its training starts."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed_for(store.training_seed, method_of(method), "start"))  # an ablation's as its method's
        return method_class(method)(recipe_of(store, method), base, store.concept(concept))


def _train_into(
    folder: Path,
    store: Store,
    base: BaseModel,
    concept: str,
    method: str,
    class_images: Path | None,
    checkpoints: TimedCheckpoints,
    listener: Listener,
) -> dict[str, Any]:
    """Returns what the training took, as far as it is known; nothing where nothing was trained."""
    from personalize_core.analyses.learned_embedding import WhileTraining
    from personalize_core.artifacts import proof, saving
    from personalize_core.report.figures.losses import loss_curve
    from personalize_core.training import loop as training
    from personalize_core.training import training_log
    from personalize_core.training.fixed_batch import fixed_batch_losses, improvement
    from personalize_core.training.run_costs import PeakMemory

    learner, seed = untrained(store, base, concept, method), store.params.seed
    images = read_latents(store, concept, method, class_images)
    stages = learner.stages()
    total = sum(stage.steps for stage in stages)
    before = fixed_batch_losses(learner, base, images, seed)

    done = {stage.name: sum(earlier.steps for earlier in stages[:number]) for number, stage in enumerate(stages)}

    watch, look = checkpoints.watch, WhileTraining(learner.to(base.device), base, total)

    def log(row: dict[str, Any]) -> None:
        watch.lap()
        if read := look(done[row["stage"]] + row["step"] + 1):
            row["learned"] = row.get("learned", {}) | {"read": read}
        watch.skip()
        metrics = {name: value for name, value in row.items() if isinstance(value, float)}
        listener(Event(f"training {method} on {concept}", done[row["stage"]] + row["step"] + 1, total, metrics))

    with proof.FreshProcess(base) if total else nullcontext() as fresh:  # without training there is nothing to prove
        with base.recomputing() if store.params.gradient_checkpointing else nullcontext():
            memory = PeakMemory(base.device)
            rows = training.train(learner, base, images, store.training_seed, log, checkpoints)
            taken = memory.costs() | ({} if watch.seconds is None else {"training_seconds": watch.seconds})
        saving.save(folder, method, learner, base, store.training_seed)
        if fresh:
            fresh.restore(folder)
        after = fixed_batch_losses(learner, base, images, seed)
        write_json(folder / "fixed_batch.json", improvement(before, after, seed))
        training_log.write(rows, folder)
        if rows:
            loss_curve(rows, folder / LOSS_CURVE)
        if fresh:
            write_json(folder / PROOF, proof.compare(proof.answer(learner, base), fresh.answer(), base))
    return taken if total else {}


def imported(folder: Path) -> bool:
    """Does the folder hold what another program learned?"""
    try:
        return bool(read_json(folder / "config.json").get("imported"))
    except (OSError, ValueError, AttributeError):
        return False


def trained_report(stamp: str, skipped: bool, started: float, folder: Path) -> Report:
    metrics = {"parameters": float(read_json(folder / "config.json")["parameters"])}
    if (folder / "fixed_batch.json").is_file():  # not with what was imported
        fixed = read_json(folder / "fixed_batch.json")
        metrics |= {
            "fixed_batch_loss_before": fixed["before"],
            "fixed_batch_loss_after": fixed["after"],
            "fixed_batch_loss_fell_by": fixed["fell_by"],
            "fell_by_at_least": fixed["interval_95"][0],
            "fell_by_at_most": fixed["interval_95"][1],
        }
    if (folder / PROOF).is_file():
        metrics["restored_samples_otherwise_by"] = read_json(folder / PROOF)["largest_difference"]
    images = {"loss": folder / LOSS_CURVE} if (folder / LOSS_CURVE).is_file() else {}
    return Report(stamp, skipped, time.monotonic() - started, folder, metrics, images)
