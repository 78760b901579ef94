"""The stale cells of one concept in one run, for a GPU that serves many: one process, which loads the base model once.

Each cell has steps of its own, which report what they made as the assets of that cell do. A cell that fails stops no
other; the run then counts as failed, and says which. A run that lost its process starts again with what is still stale.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import dagster as dg

from personalize_core.methods import MARK
from pipelines.assets import asset_defaults
from pipelines.assets.experiments import allowed
from pipelines.assets.failures import judge
from pipelines.automation import found_results, requests
from pipelines.partitions import METHODS, concepts
from pipelines.presentation.progress import logged
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.steps import Listener, Report
    from personalize_core.workspace.store import Store

    Step = Callable[[Store, str, str, Listener], Report]

Events = Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation | dg.Output[None]]


def keys_of(methods: Iterable[str]) -> dict[str, str]:
    """Key -> method; Dagster's keys hold letters, digits and _ alone."""
    return {allowed(method.replace(MARK, "__")): method for method in methods}


KEYS = keys_of(METHODS)


@dg.op(
    out=dg.DynamicOut(dg.Nothing),
    description="The methods that are not up to date for this concept, each the beginning of a cell.",
)
def stale_methods(context: dg.OpExecutionContext, workspace: Workspace) -> Iterator[dg.DynamicOutput[None]]:
    stale = requests.without_run(context.instance, workspace.store(), [context.partition_key])
    for cell in stale:
        if not cell.possible:
            context.log.warning(f"{cell.method} on {cell.concept}: {cell.why}")
    methods = {cell.method for cell in stale if cell.possible}
    for key, method in KEYS.items():
        if method in methods:
            yield dg.DynamicOutput(None, mapping_key=key)


def _train(store: "Store", concept: str, method: str, listener: "Listener") -> "Report":
    from personalize_core import steps

    steps.check_inputs(store, [concept], [method])
    return steps.train(store, concept, method, listener)


def _sample(store: "Store", concept: str, method: str, listener: "Listener") -> "Report":
    from personalize_core import steps

    return steps.sample_grid(store, concept, method, listener)


def _score(store: "Store", concept: str, method: str, listener: "Listener") -> "Report":
    from personalize_core import steps

    return steps.score(store, concept, method, listener)


def _step_of_cell(name: str, asset: str, step: "Step", description: str) -> dg.OpDefinition:
    @dg.op(
        name=name,
        ins={"before": dg.In(dg.Nothing)},
        out=dg.Out(dg.Nothing),
        pool=asset_defaults.GPU,
        description=description,
    )
    def of_cell(context: dg.OpExecutionContext, workspace: Workspace) -> Events:
        concept, method = context.partition_key, KEYS[context.get_mapping_key() or ""]
        try:
            report = step(workspace.store(), concept, method, logged(context))
        except Exception as error:
            verdict = judge(error, context)
            if isinstance(verdict, dg.Failure):
                raise dg.Failure(f"{method} on {concept}: {verdict.description}", allow_retries=False) from error
            raise verdict or error from error
        failed = []
        for event in found_results.made(context.instance, workspace, asset, concept, method, report):
            yield event
            if isinstance(event, dg.AssetCheckEvaluation) and not event.passed:
                if event.severity == dg.AssetCheckSeverity.ERROR:
                    failed.append(f"the check {event.check_name} failed: {event.description}")
        if failed:
            raise dg.Failure(f"{method} on {concept}: {'; '.join(failed)}", allow_retries=False)
        yield dg.Output(None)

    return of_cell


train_cell = _step_of_cell("train_cell", "artifact", _train, "Train one method on the concept.")
sample_cell = _step_of_cell("sample_cell", "image_grid", _sample, "Sample with what was learned.")
score_cell = _step_of_cell("score_cell", "metrics", _score, "Score what was sampled.")


@dg.job(
    name=requests.LEARN_CONCEPT,
    partitions_def=concepts,
    executor_def=dg.in_process_executor,
    tags={"dagster/retry_strategy": "ALL_STEPS"},  # what is stale is found anew; finished cells are not
    description="Train every stale method on one concept, sample and score, in one process that loads the base model "
    "once. With automation.together, schedules and sensors ask for this job in place of a run of `learn` for each "
    "cell.",
)
def learn_concept():
    stale_methods().map(lambda before: score_cell(sample_cell(train_cell(before))))
