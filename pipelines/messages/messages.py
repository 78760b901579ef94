"""What is told, as messages: of a failed check of an asset, and of a folder that cannot be used.

Annotations are evaluated here, as in assets/chain.py: Dagster looks at the type of `context` itself.
"""

import functools
import hashlib
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import dagster as dg

from pipelines.messages import delivery
from pipelines.messages.delivery import Message
from pipelines.partitions import CONCEPT, METHOD
from pipelines.resources import Workspace

if TYPE_CHECKING:
    from personalize_core.workspace.store import Store

Arguments = ParamSpec("Arguments")


def failed_checks_told(
    body: Callable[Arguments, dg.MaterializeResult],
) -> Callable[Arguments, dg.MaterializeResult]:
    """An asset's body; a serious check of its result that failed is told. A warning is only shown."""

    @functools.wraps(body)
    def asset(*arguments: Arguments.args, **named: Arguments.kwargs) -> dg.MaterializeResult:
        result = body(*arguments, **named)
        everything = (*arguments, *named.values())
        contexts = [each for each in everything if isinstance(each, dg.AssetExecutionContext)]
        workspaces = [each for each in everything if isinstance(each, Workspace)]
        serious = [each for each in result.check_results or [] if each.severity == dg.AssetCheckSeverity.ERROR]
        for context, workspace in zip(contexts, workspaces, strict=False):
            for check in serious:
                if not check.passed:
                    tell(workspace.store(), functools.partial(_of_check, context, check), context.log)
        return result

    return asset


def refused(store: "Store", name: str, why: str, log: Any) -> None:
    """Tell of a folder that cannot be used."""
    digest = hashlib.sha256(why.encode()).hexdigest()[:12]
    title = f"the folder {name!r} was refused"
    tell(
        store,
        lambda link: Message(
            f"folder-{name}-{digest}", "refused_folder", title, why, link_of_asset(link, "concept_images", name), name
        ),
        log,
    )


def tell(store: "Store", message: Callable[[str], Message], log: Any) -> None:
    """Never raises: a run does not fail because nobody can be told."""
    try:
        notify = delivery.configured(store)
        if notify.channels:
            delivery.write(store, message(notify.link.rstrip("/")))
    except Exception as error:
        log.warning(f"A message could not be written down: {error}")


def _of_check(context: dg.AssetExecutionContext, check: dg.AssetCheckResult, link: str) -> Message:
    key = context.partition_key if context.has_partition_key else None
    keys = key.keys_by_dimension if isinstance(key, dg.MultiPartitionKey) else {CONCEPT: key}
    concept, method = keys.get(CONCEPT), keys.get(METHOD)
    title = f"the check {check.check_name}{about(concept, method)} failed"
    asset = context.asset_key.to_user_string()
    why = check.description or f"See the check of {asset}."
    name = f"check-{context.run.run_id}-{check.check_name}"
    return Message(name, "failed_check", title, why, link_of_asset(link, asset, key), concept, method)


def about(concept: str | None, method: str | None) -> str:
    return f" of {method} on {concept}" if method else f" of {concept}" if concept else ""


def link_of_run(link: str, run_id: str) -> str:
    return f"{link}/runs/{run_id}"


def link_of_asset(link: str, asset: str, partition: str | None) -> str:
    query = {"view": "partitions", "partition": partition} if partition else {"view": "events"}
    return f"{link}/assets/{asset}?{urllib.parse.urlencode(query)}"
