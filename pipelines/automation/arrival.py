"""Folders of concept images become partitions, or are reported with what is wrong with them."""

import hashlib
import json
import uuid
from datetime import datetime

import dagster as dg

from pipelines.assets import chain, settings
from pipelines.automation import intake, jobs
from pipelines.automation.requests import FIRST, is_under_way, preparation
from pipelines.messages import messages
from pipelines.partitions import CONCEPT, concepts
from pipelines.resources import Workspace

CHECK = "folders_usable"
NOTHING = {"seen": {}, "there": {}, "reported": {}, "failed": None, "count": 0}


@dg.asset_check(
    asset=chain.concept_images.key,
    name=CHECK,
    description="Every folder that arrived has a description and concept images that can all be read. The sensor "
    "`concept_folder` reports each that has not, with its reason; the others go on without it. Run by hand, it looks "
    "at data/concepts anew, and repeats what the sensor found where concepts arrive elsewhere.",
)
def folders_usable(workspace: Workspace) -> dg.AssetCheckResult:
    from personalize_core.workspace import arrival

    store = workspace.store()
    found = arrival.look(store, again=True)
    failed = {name: folder.problem for name, folder in found.items() if folder.problem}
    return dg.AssetCheckResult(**_verdict(failed | arrival.refusals(store), len(found)))


@dg.sensor(
    jobs=[jobs.arrive, jobs.prepare, jobs.compare],
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    tags={"stage": "arrival"},
    description="Keeps the partition `concept` like the folders of data/concepts, and reports what they hold. It only "
    "lists files: what has changed is copied and read by the asset `arrival`, for which it asks. A folder counts when "
    "it was the same on two looks, so that one that is being copied is left to settle. One that cannot be used is "
    f"reported with the reason, on `concept_images` and its check `{CHECK}`, and is looked at again when it changes. "
    "With automation.continuous each concept that has arrived is trained at once.",
)
def concept_folder(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult:
    """The cursor holds what the last look saw, and what has been reported; a tick that failed leaves it as it was."""
    from personalize_core.errors import InputError
    from personalize_core.workspace import arrival
    from personalize_core.workspace.automation import Automation
    from personalize_core.workspace.params import Params

    store = workspace.store()
    last = NOTHING | {"begun": uuid.uuid4().hex[:8]} | json.loads(context.cursor or "{}")
    now = arrival.listed(store.concepts)
    there, elsewhere, automation, where = last["there"], {}, Automation(), "params.yaml"
    wanted, left = {}, []
    try:
        automation = Params.read_automation(store.root / where)
        where = automation.arrival
        address = arrival.address_of(store, where)
        there = arrival.listing(address) if address else {}
        elsewhere = arrival.refusals(store) if address else {}
        if address:
            settled_there = {name: state for name, state in there.items() if last["there"].get(name) == state}
            wanted, left = arrival.to_bring(store, address, settled_there, there.keys() | last["there"].keys(), now)
    except InputError as error:  # what lies in data/concepts is looked at all the same
        elsewhere = {where: str(error)}

    found = arrival.known(store, now)
    settled = {name for name, state in now.items() if last["seen"].get(name) == state}
    unread = sorted(settled - found.keys())
    good = {name for name in settled & found.keys() if not found[name].problem}
    failed = {name: str(found[name].problem) for name in sorted((settled & found.keys()) - good)} | elsewhere
    unsettled = {
        name: why for name, why in (last["failed"] or {}).items() if name in now and name not in failed.keys() | good
    }
    failed = unsettled | failed

    known = set(context.instance.get_dynamic_partitions(CONCEPT))
    added = sorted(good - known)
    gone = sorted(known - now.keys() - last["seen"].keys())
    changed = sorted(name for name in good if last["reported"].get(name) != found[name].state)
    reported = {name: content for name, content in last["reported"].items() if name not in gone}
    reported |= {name: found[name].state for name in changed}
    events = [event for name in changed for event in _arrived(store.concept_folder(name), name, found[name])]
    if failed != (last["failed"] or {}) or (last["failed"] is None and reported):
        new = {name: why for name, why in failed.items() if (last["failed"] or {}).get(name) != why}
        for name, why in new.items():
            messages.refused(store, name, why, context.log)
        events += [_cannot_be_used(name, why) for name, why in new.items()]
        verdict = _verdict(failed, len(failed.keys() | now.keys()))
        events.append(dg.AssetCheckEvaluation(asset_key=chain.concept_images.key, check_name=CHECK, **verdict))

    count = last["count"] + bool(changed or gone)
    occasion = f"{last['begun']} {count}"  # of its own for every cursor: a key that was used once asks for nothing more
    requests = [preparation(name, f"arrived {occasion}") for name in changed] if automation.continuous else []
    if gone and store.comparison().is_dir():
        requests.append(dg.RunRequest(job_name=jobs.compare.name, run_key=f"gone {occasion}"))
    if (unread or wanted or left) and not is_under_way(context.instance, jobs.arrive.name):
        config = dg.RunConfig({"arrival": intake.Arrived(wanted=wanted, gone=left)})
        what = json.dumps([{name: now[name] for name in unread}, wanted, left])
        asked = hashlib.sha256(what.encode()).hexdigest()[:16]
        hour = f"{datetime.now():%Y-%m-%d %H}"  # what may pass is tried again, once an hour
        key = f"arrived {last['begun']} {asked} {hour}"
        requests.append(dg.RunRequest(key, config, job_name=jobs.arrive.name, tags=FIRST))
    news = bool(added or gone or changed or requests)
    why = None if news else "; ".join(failed.values()) or "the folders of data/concepts are as they were"
    return dg.SensorResult(
        skip_reason=why,
        run_requests=requests if news else None,
        cursor=json.dumps(
            {
                "seen": now,
                "there": there,
                "reported": reported,
                "failed": last["failed"] if failed == {} and not reported else failed,
                "count": count,
                "begun": last["begun"],
            }
        ),
        dynamic_partitions_requests=[
            *([concepts.build_add_request(added)] if added else []),
            *([concepts.build_delete_request(gone)] if gone else []),
        ],
        asset_events=events,
    )


def _arrived(path, name: str, folder) -> list:
    about = {"path": str(path), "class_noun": folder.class_noun, "concept_images": folder.concept_images}
    return settings.events(chain.concept_images.key, name, folder.state, about)


def _cannot_be_used(name: str, why: str) -> dg.AssetObservation:
    return dg.AssetObservation(
        chain.concept_images.key,
        partition=name,
        description=why,
        metadata={"cannot_be_used": dg.MetadataValue.text(why)},
    )


def _verdict(failed: dict, folders: int) -> dict:
    """What the check says: how many folders cannot be used, and why not."""
    return {
        "passed": not failed,
        "severity": dg.AssetCheckSeverity.ERROR,
        "description": f"{len(failed)} of {folders} folders cannot be used: {'; '.join(failed)}" if failed else None,
        "metadata": {"folders": folders, "cannot_be_used": len(failed)} | intake.table(failed),
    }
