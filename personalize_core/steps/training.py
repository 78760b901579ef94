"""Latents to an artifact: what one method learns about one concept, and the proof that it can be read again."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize_core.artifacts.description import imported
from personalize_core.files.atomic import is_up_to_date, read_result, write_json
from personalize_core.methods import method_class, method_of
from personalize_core.randomness import seed_for
from personalize_core.steps.class_images import class_images_for, encode_real_class_images
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.latents import encode_concept, read_latents
from personalize_core.training.probe_files import ENDED, PROBE_CURVES, PROBE_IMAGES
from personalize_core.training.run_costs import TimedCheckpoints
from personalize_core.workspace.lineage.making import making
from personalize_core.workspace.recipes import images_trained_on, load_base
from personalize_core.workspace.stamps.made import artifact_stamp
from personalize_core.workspace.stamps.training import TrainingInputs, training_inputs
from personalize_core.workspace.store import Store

if TYPE_CHECKING:
    from personalize_core.base_model.model import BaseModel
    from personalize_core.concepts.images import ConceptLatents
    from personalize_core.methods.interface import Method
    from personalize_core.steps.probing import Probing
    from personalize_core.training.watch import Heard

LOSS_CURVE = "loss.png"
UNTIL_IT_ENDED = "seconds_until_it_ended"  # in the costs of a training that failed, or that who heard of it ended
PROOF = "proof.json"  # beside the weights: a fresh process sampled with them what the trainer sampled


def train(store: Store, concept: str, method: str, listener: Listener = unheard, heard: Heard | None = None) -> Report:
    """What one method learns about one concept; with its losses, and the loss on a fixed batch before and after.

    A run that was cut off goes on from its last checkpoint, to the same result. What was learned appears only after a
    fresh process has sampled with it just what the trainer samples. What was imported is kept as it is.

    Args:
        heard: hears of each probe; what it raises ends the training, which leaves its last checkpoint and, among the
            costs, what it took.

    Raises:
        InputError: the concept, the method or its recipe is not usable, or what was imported is not of this method
            and base model; nothing has been computed then.
        ProofFailed: the artifact, read from disk, samples something else.
    """
    store.params.check_method(method)
    started = time.monotonic()
    folder = store.artifact(method, concept)
    if imported(folder):
        return trained_report(artifact_stamp(store, concept, method), True, started, folder)
    inputs = training_inputs(store, concept, method)  # first: what changes meanwhile counts as new the next time
    class_images = _prepare(store, inputs, listener)
    checkpoints = TimedCheckpoints(store.checkpoints(method, concept), inputs.stamp)
    with store.alone("artifact", method, concept):
        if is_up_to_date(folder, inputs.stamp):
            checkpoints.clear()  # the run that trained it may have been killed before it could
            return trained_report(inputs.stamp, True, started, folder)
        with making(store, folder, inputs.stamp) as new, store.device():
            base = load_base(store)
            base.tokenizer.check_class_noun(inputs.concept)
            try:
                costs = _train_into(new, store, inputs, base, class_images, checkpoints, listener, heard)
            except Exception:
                if not folder.exists():  # else these are the costs of what lies there
                    ended = {UNTIL_IT_ENDED: sum(checkpoints.costs.values())}
                    write_json(store.training_costs(method, concept), {"stamp": inputs.stamp, **ended})
                raise
            if costs:  # before the artifact appears: a run killed just after that would never write them
                write_json(store.training_costs(method, concept), {"stamp": inputs.stamp, **costs})
        checkpoints.clear()
    return trained_report(inputs.stamp, False, started, folder)


def untrained(store: Store, inputs: TrainingInputs, base: BaseModel) -> Method:
    """The method as its training starts."""
    import torch

    with torch.random.fork_rng():
        # an ablation starts as its method does
        torch.manual_seed(seed_for(store.training_seed, method_of(inputs.method), "start"))
        return method_class(inputs.method)(inputs.config, base, inputs.concept)


def _prepare(store: Store, inputs: TrainingInputs, listener: Listener) -> Path | None:
    """Latents of the concept's images, and of class images where the method wants some; returns the folder of these."""
    noun, config = inputs.concept.class_noun, inputs.config
    encode_concept(store, inputs.concept.name, inputs.preprocessing, listener)
    if not config.class_images_needed:
        return None
    encode = encode_real_class_images if config.real_class_images else class_images_for
    return encode(store, noun, inputs.method, listener).path


def _train_into(
    folder: Path,
    store: Store,
    inputs: TrainingInputs,
    base: BaseModel,
    class_images: Path | None,
    checkpoints: TimedCheckpoints,
    listener: Listener,
    heard: Heard | None,
) -> dict[str, Any]:
    """Train, save and prove.

    Returns:
        the costs of the training, as far as they are known; nothing where nothing was trained.
    """
    from personalize_core.artifacts import proof, saving
    from personalize_core.concepts.image_files import load_image
    from personalize_core.methods.interface import SeesImages
    from personalize_core.report.figures.losses import loss_curve
    from personalize_core.steps.probing import Probing
    from personalize_core.training import training_log
    from personalize_core.training.fixed_batch import fixed_batch_losses, improvement

    learner, seed = untrained(store, inputs, base), store.params.seed
    images = read_latents(store, inputs.concept.name, inputs.method, class_images)
    sees = isinstance(learner, SeesImages)
    if sees:
        learner.see([load_image(path) for path in images_trained_on(store, inputs.concept.name)], base)
    before = fixed_batch_losses(learner, base, images, seed)
    trains = any(stage.steps for stage in learner.stages())
    with proof.FreshProcess(base) if trains or sees else nullcontext() as fresh:  # else there is nothing to prove
        probed = Probing(store, inputs, learner, base, images, checkpoints.probed, heard)
        log, costs = _trained(learner, store, inputs, base, images, checkpoints, probed, listener)
        saving.save(folder, inputs.method, learner, base, store.training_seed)
        if fresh:
            base.give_back_memory()
            fresh.restore(folder)
        after = fixed_batch_losses(learner, base, images, seed)
        write_json(folder / "fixed_batch.json", improvement(before, after, seed))
        training_log.write(log, folder)
        probed.save(folder)
        if log:
            loss_curve(log, folder / LOSS_CURVE, fixed_inputs=probed.fixed_inputs)
        if fresh:
            write_json(folder / PROOF, proof.compare(proof.evidence(learner, base), fresh.evidence(), base))
    return costs if trains else {}


def _trained(
    learner: Method,
    store: Store,
    inputs: TrainingInputs,
    base: BaseModel,
    images: ConceptLatents,
    checkpoints: TimedCheckpoints,
    probed: Probing,
    listener: Listener,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all stages. Returns the log and the costs."""
    from personalize_core.analyses.learned_embedding import WhileTraining
    from personalize_core.training.loop import train as run_stages
    from personalize_core.training.micro_batches import RowsAtOnce
    from personalize_core.training.run_costs import PeakMemory

    stages, what = learner.stages(), f"training {inputs.method} on {inputs.concept.name}"
    total = sum(stage.steps for stage in stages)
    done = {stage.name: sum(earlier.steps for earlier in stages[:number]) for number, stage in enumerate(stages)}
    watch, look = checkpoints.watch, WhileTraining(learner.to(base.device), base, total)

    def log(row: dict[str, Any]) -> None:
        watch.lap()
        if read := look(done[row["stage"]] + row["step"] + 1):
            row.setdefault("learned", {})["read"] = read
        watch.skip()
        metrics = {name: value for name, value in row.items() if isinstance(value, float)}
        listener(Event(what, done[row["stage"]] + row["step"] + 1, total, metrics))

    with base.compiled(), base.recomputing() if store.params.gradient_checkpointing else nullcontext():
        memory, at_once = PeakMemory(base.device), RowsAtOnce.of(store.params.micro_batch)
        rows = run_stages(
            learner,
            base,
            images,
            store.training_seed,
            log,
            checkpoints,
            at_once,
            store.params.optimizer,
            probed.watch,
        )
        costs = memory.costs() | checkpoints.costs
        costs |= {"micro_batch": at_once.rows} if at_once.rows else {}
    return rows, costs


def trained_report(stamp: str, skipped: bool, started: float, folder: Path) -> Report:
    metrics = {"parameters": float(read_result(folder / "config.json", parameters=int)["parameters"])}
    if (folder / "fixed_batch.json").is_file():  # not with what was imported
        fixed = read_result(folder / "fixed_batch.json", before=float, after=float, fell_by=float, interval_95=list)
        metrics |= {
            "fixed_batch_loss_before": fixed["before"],
            "fixed_batch_loss_after": fixed["after"],
            "fixed_batch_loss_fell_by": fixed["fell_by"],
            "fell_by_at_least": fixed["interval_95"][0],
            "fell_by_at_most": fixed["interval_95"][1],
        }
    if (folder / PROOF).is_file():
        proved = read_result(folder / PROOF, largest_difference=float)
        metrics["restored_samples_otherwise_by"] = proved["largest_difference"]
    if (folder / ENDED).is_file():
        ended = read_result(folder / ENDED, steps=int, of=int)
        metrics |= {"steps": float(ended["steps"]), "steps_saved": float(ended["of"] - ended["steps"])}
    shown = {"loss": LOSS_CURVE, "probes": PROBE_CURVES, "probe_images": PROBE_IMAGES}
    images = {name: folder / file for name, file in shown.items() if (folder / file).is_file()}
    return Report(stamp, skipped, time.monotonic() - started, folder, metrics, images)
