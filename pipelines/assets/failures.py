"""What becomes of an asset whose step failed: tried again, where that may help; else an event that says what to do.

And of a tick of a schedule or sensor that met wrong input: it asks for nothing, and says why.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import dagster as dg

WAITS = (5.0, 20.0, 80.0)  # seconds before another attempt, each a quarter longer or shorter by chance

Arguments = ParamSpec("Arguments")
Asked = TypeVar("Asked")


def sorted_out(
    body: Callable[Arguments, dg.MaterializeResult],
) -> Callable[Arguments, dg.MaterializeResult]:
    """An asset's body, with its failures sorted out.

    What passes by itself is tried again in the same process, which keeps its place in the pool: a base model that is
    loaded stays loaded. Wrong input, a full disk, memory that does not suffice are not tried again, by anyone: they end
    in one sentence that says what to do. Everything else is a fault of ours, and keeps its traceback.
    """

    @functools.wraps(body)
    def asset(*arguments: Arguments.args, **named: Arguments.kwargs) -> dg.MaterializeResult:
        try:
            return body(*arguments, **named)
        except Exception as error:
            (context,) = (each for each in (*arguments, *named.values()) if isinstance(each, dg.AssetExecutionContext))
            verdict = judge(error, context)
            if verdict is None:
                raise
            raise verdict from error

    return asset


def or_skipped(tick: Callable[Arguments, Asked]) -> Callable[Arguments, Asked | dg.SkipReason]:
    """A tick that is skipped, with one sentence, where params.yaml or what it looks at is damaged."""

    @functools.wraps(tick)
    def evaluate(*arguments: Arguments.args, **named: Arguments.kwargs) -> Asked | dg.SkipReason:
        from personalize_core.errors import InputError

        try:
            return tick(*arguments, **named)
        except InputError as error:
            return dg.SkipReason(str(error))

    return evaluate


def judge(
    error: Exception, context: dg.AssetExecutionContext | dg.OpExecutionContext
) -> dg.Failure | dg.RetryRequested | None:
    """What Dagster should be told in place of the error; None where it should be told the error itself."""
    from personalize_core.errors import InputError
    from personalize_core.workspace.failures import diagnose

    diagnosis, attempts = diagnose(error), context.retry_number
    if diagnosis and diagnosis.passes and attempts < len(WAITS):
        wait = WAITS[attempts] * random.uniform(0.75, 1.25)  # so that those who failed together do not meet again
        context.log.warning(f"{diagnosis.sentence}. Attempt {attempts + 2} of {len(WAITS) + 1} in {wait:.0f} s")
        return dg.RetryRequested(max_retries=len(WAITS), seconds_to_wait=wait)
    if diagnosis:
        times = f" (tried {attempts + 1} times)" if attempts else ""
        return dg.Failure(f"{diagnosis.sentence}{times}", allow_retries=False)
    if isinstance(error, InputError):
        return dg.Failure(str(error), allow_retries=False)
    return None
