"""Steps over many concepts and methods: shared out among processes, with progress and a table of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from personalize_core.cli.terminal import print_line, print_table, progress, short
from personalize_core.errors import InputError, together

if TYPE_CHECKING:
    from personalize_core.steps import Cell, Listener, Report
    from personalize_core.workspace.store import Store


def over_cells(
    store: Store,
    concepts: list[str] | None,
    methods: list[str] | None,
    what: Sequence[Callable],
    processes: int | None,
    references: bool = False,
) -> None:
    """Run steps for every pair of a concept and a method, and print a table of what they did.

    All inputs are checked first, so that a mistake ends the command before anything is trained.

    Args:
        what: steps that take (store, concept, method, listener), in their order.
        references: also score the concept images of each concept with each other.

    Raises:
        InputError: an input is wrong.
    """
    from personalize_core import steps
    from personalize_core.steps.processes import in_turn, shared_out

    methods = methods or store.params.method_names
    if not concepts:
        steps.check_concepts_wanted(store)
        concepts = steps.concepts_wanted(store)
    steps.check_inputs(store, concepts, methods)
    cells = [(concept, method) for concept in concepts for method in methods]
    tasks = [partial(in_turn, what, store, concept, method) for concept, method in cells]
    if references:
        tasks += [partial(in_turn, [steps.score_references], store, concept) for concept in concepts]
    plan = steps.plan(store, concepts, methods)
    print_notices(store, plan)
    processes = _processes(store, processes, len(plan))
    with progress() as listener:
        reports = [result() for result in shared_out(tasks, processes, listener)]
    columns = ("Concept", "Method", "State", "Loss on a fixed batch, its decrease [95 % interval]", "Images")
    rows = [_row(*cell, made) for cell, made in zip(cells, reports, strict=False)]  # the references' reports follow
    print_table(columns, rows)


def over_concepts(store: Store, step: Callable, *method: str) -> None:
    """Run one step for every concept that params.yaml or the protocol asks for.

    Raises:
        InputError: see `each`; or an input is wrong.
    """
    from personalize_core import steps

    steps.check_concepts_wanted(store)
    steps.check_inputs(store, [], store.params.method_names)
    concepts = steps.concepts_wanted(store)
    wrong = {name: found for name in concepts if (found := steps.problems_of(store, [name], method))}
    right = [name for name in concepts if name not in wrong]
    plan = steps.plan(store, right, list(method)) if method else []
    print_notices(store, plan)
    processes = _processes(store, None, len(plan))
    each(right, [partial(step, store, concept, *method) for concept in right], processes, wrong)


def print_notices(store: Store, plan: Sequence[Cell]) -> None:
    """What a person should know before the work of a plan begins."""
    from personalize_core import steps

    for notice in (steps.earlier_version_notice(plan), steps.long_work_notice(store, plan)):
        if notice:
            print_line(notice)


def each(
    names: list[str],
    tasks: Sequence[Callable[[Listener], Report]],
    processes: int = 1,
    wrong: Mapping[str, Sequence[InputError]] | None = None,
) -> None:
    """Run a task for each name and print what it wrote. A wrong input of one does not stop the others.

    Args:
        wrong: what is wrong with names that have no task, as far as it was found before.

    Raises:
        InputError: at the end, with every input that was wrong.
    """
    from personalize_core.steps.processes import shared_out

    failed = [InputError(f"{name}: {error}") for name, errors in (wrong or {}).items() for error in errors]
    with progress() as listener:
        for name, result in zip(names, shared_out(tasks, processes, listener), strict=True):
            try:
                report = result()
                print_line(f"{'up to date' if report.skipped else 'written':<10}  {report.path}")
                for notice in report.notices:
                    print_line(f"            {notice}")
            except InputError as error:
                failed.append(InputError(f"{name}: {error}"))
    if failed:
        raise together(failed)


def _processes(store: Store, asked: int | None, cells: int) -> int:
    """At most one for each cell that is not up to date: a process takes seconds to start."""
    from personalize_core import steps

    return min(cells, steps.processes_of(store, asked)) if cells > 1 else 1


def _row(concept: str, method: str, reports: list[Report]) -> list[str]:
    metrics = {name: value for report in reports for name, value in report.metrics.items()}
    made = [report for report in reports if not report.skipped]
    state = f"done in {sum(report.seconds for report in made):.0f} s" if made else "up to date"
    loss = "-"
    if metrics.get("parameters") and "fell_by_at_least" in metrics:
        low, high = metrics["fell_by_at_least"], metrics["fell_by_at_most"]
        loss = f"{metrics['fixed_batch_loss_before']:.4f} - {metrics['fixed_batch_loss_fell_by']:.4f}"
        loss += f" [{low:.4f}, {high:.4f}]"
    images = [short(path) for report in reports for path in report.images.values()]
    return [concept, method, state, loss, "\n".join(images)]
