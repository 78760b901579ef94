"""A failure ends in a word of what to do, and only what passes by itself is tried again."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import dagster as dg
import filelock
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from personalize_core import steps
from personalize_core.artifacts import proof
from personalize_core.cli import main as command_line
from personalize_core.errors import InputError
from personalize_core.workspace.failures import diagnose
from personalize_core.workspace.store import Store
from pipelines.assets import chain, external, failures
from pipelines.definitions import defs
from pipelines.presentation import metadata
from pipelines.resources import Workspace
from tests.in_dagster import materialize, passing

PAIR = dg.MultiPartitionKey({"concept": "dog7", "method": "textual_inversion"})


def raised(error: Exception, by: BaseException | None = None, silently: bool = False) -> Exception:
    """The error as it comes out of a function that raised it while it dealt with another."""
    try:
        try:
            raise by or KeyError
        except BaseException as first:
            raise error from (None if silently else first)
    except Exception as caught:
        return caught


FULL = {
    "a full disk": OSError(errno.ENOSPC, "No space left on device", "data/artifacts"),
    "a used-up quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a library's full disk": RuntimeError("Parquet error: No space left on device (os error 28)"),
    "a fresh process's full disk": proof.ProofFailed("cannot sample: OSError: [Errno 28] No space left on device"),
}
LIMITS = {
    "a read-only file system": (errno.EROFS, "is read-only"),
    "a file of another user": (errno.EACCES, "change its owner or permissions"),
    "what is not permitted": (errno.EPERM, "change its owner or permissions"),
    "a limit of a file's size": (errno.EFBIG, "ulimit -f"),
    "a limit of open files": (errno.EMFILE, "ulimit -n"),
}
EXHAUSTED = {
    "Python's memory": MemoryError(),
    "torch's memory": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "the system's memory": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
PASSING = {
    "a lock": filelock.Timeout("data/.work/locks/device.lock"),
    "a connection": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "a name server": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "a time limit": TimeoutError("timed out"),
    "a network file system": OSError(errno.ESTALE, "Stale file handle"),
    "a process that was ended": ChildProcessError("it was ended by signal 9"),
    "a hub behind a refusal": raised(InputError("the base model 'sd-1.4' cannot be loaded"), ConnectionError("no")),
}
UNKNOWN = {
    "wrong input": InputError("there is no concept 'rex'; add one"),
    "wrong input found silently": raised(InputError("there is no concept"), ConnectionError("no"), silently=True),
    "a file that is not there": FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "a name that is not": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    "a fault of ours": ZeroDivisionError(),
}


def cases(errors: dict[str, Exception]):
    return pytest.mark.parametrize("error", errors.values(), ids=errors.keys())


@cases({**FULL, **EXHAUSTED})
def test_what_does_not_pass_by_itself_is_told_so_with_what_to_do(error):
    diagnosis = diagnose(error)
    assert diagnosis and not diagnosis.passes
    assert "run this again" in diagnosis.sentence


@pytest.mark.parametrize(("number", "advice"), LIMITS.values(), ids=LIMITS.keys())
def test_a_limit_of_the_system_is_told_with_what_lifts_it(number, advice):
    diagnosis = diagnose(OSError(number, os.strerror(number), "data/artifacts"))
    assert (
        diagnosis and not diagnosis.passes and advice in diagnosis.sentence and "run this again" in diagnosis.sentence
    )
    assert "(data/artifacts)" in diagnosis.sentence or number == errno.EMFILE


@cases(PASSING)
def test_what_passes_by_itself_is_known(error):
    diagnosis = diagnose(error)
    assert diagnosis and diagnosis.passes and "did not answer" in diagnosis.sentence


@cases(UNKNOWN)
def test_nothing_is_said_of_what_is_not_known(error):
    assert diagnose(error) is None


def test_a_full_disk_says_where():
    diagnosis = diagnose(FULL["a full disk"])
    assert diagnosis and "(data/artifacts)" in diagnosis.sentence


def test_blocks_that_cannot_be_compiled_say_how_to_do_without():
    failed = BackendCompilerFailed(lambda: None, OSError("g++ is broken"), None)
    diagnosis = diagnose(failed)
    assert diagnosis and not diagnosis.passes
    assert "g++ is broken" in diagnosis.sentence and "compile: false" in diagnosis.sentence


@pytest.mark.parametrize(("others", "passes"), [(0, False), (3, False), (30, True)])
def test_a_full_card_passes_only_where_others_hold_its_memory(others, passes, monkeypatch):
    """GiB of a card of 80: what torch's own pool does not hold is a context of our own, or another process's."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: (79 - others) * gib)
    diagnosis = diagnose(torch.OutOfMemoryError("CUDA out of memory"))
    assert diagnosis and diagnosis.passes == passes
    advice = (
        "other processes hold 30.0 of its 80.0 GiB" if passes else "micro_batch: auto, gradient_checkpointing: true"
    )
    assert advice in diagnosis.sentence


# In Dagster


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Training that fails so often, then goes well; how often it was tried."""

    def fail(error: BaseException, times: int) -> list[None]:
        tried = []

        def train(*arguments):
            tried.append(None)
            if len(tried) <= times:
                raise error
            return steps.Report(stamp="s", skipped=False, seconds=1.0, path=tmp_path)

        monkeypatch.setattr(steps, "train", train)
        monkeypatch.setattr(steps, "check_inputs", lambda *arguments: None)
        monkeypatch.setattr(steps, "plan", lambda *arguments: [])
        monkeypatch.setattr(steps, "long_work_notice", lambda *arguments: None)
        monkeypatch.setattr(steps, "recipe_stamp", lambda *arguments: "settings")
        monkeypatch.setattr(steps.result_checks, "artifact", passing("artifact"))
        monkeypatch.setattr(metadata, "loss_curve", lambda report: {})
        monkeypatch.setattr(failures, "WAITS", (0.04, 0.08, 0.16))
        return tried

    return fail


def train(instance: dg.DagsterInstance, root: Path) -> dg.ExecuteInProcessResult:
    return materialize(instance, root, [chain.artifact], PAIR, raise_on_error=False)


def said(result: dg.ExecuteInProcessResult) -> str:
    """The sentence of the event in which the step ended."""
    failure = result.failure_data_for_node("artifact")
    assert failure and failure.user_failure_data
    return failure.user_failure_data.description or ""


@cases(PASSING)
def test_what_passes_is_tried_again_each_time_later(error, instance, failing, tmp_path):
    tried = failing(error, times=3)
    result = train(instance, tmp_path)
    assert result.success and len(tried) == 4
    waits = [
        float(event.step_retry_data.seconds_to_wait or 0) for event in result.all_events if event.is_step_up_for_retry
    ]
    assert len(waits) == 3
    for wait, about in zip(waits, failures.WAITS, strict=True):
        assert 0.75 * about <= wait <= 1.25 * about


def test_what_does_not_pass_in_time_ends_in_a_word_of_what_to_do(instance, failing, tmp_path):
    tried = failing(PASSING["a connection"], times=100)
    result = train(instance, tmp_path)
    assert not result.success and len(tried) == 4
    assert "Connection reset by peer" in said(result) and "run it again when it does (tried 4 times)" in said(result)


@cases({**FULL, **EXHAUSTED, "wrong input": UNKNOWN["wrong input"]})
def test_what_does_not_pass_is_tried_once_and_says_what_to_do(error, instance, failing, tmp_path):
    tried = failing(error, times=1)
    result = train(instance, tmp_path)
    assert not result.success and len(tried) == 1
    expected = diagnose(error)
    assert said(result) == (expected.sentence if expected else str(error))


def test_a_fault_of_ours_is_tried_once_and_keeps_its_traceback(instance, failing, tmp_path):
    tried = failing(ZeroDivisionError("a fault"), times=1)
    result = train(instance, tmp_path)
    failure = result.failure_data_for_node("artifact")
    assert not result.success and len(tried) == 1
    assert failure and failure.error and failure.error.cause and failure.error.cause.cls_name == "ZeroDivisionError"


EVERY = [each for each in defs.assets or [] if isinstance(each, dg.AssetsDefinition)]


@pytest.mark.parametrize("asset", EVERY, ids=lambda asset: asset.op.name)
def test_every_asset_has_its_failures_sorted_out(asset, instance, monkeypatch, tmp_path):
    """Whatever an asset does, it asks for the workspace's store first."""

    def full(workspace):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Workspace, "store", full)
    key = PAIR if isinstance(asset.partitions_def, dg.MultiPartitionsDefinition) else "dog7"
    if asset.partitions_def == external.concept_and_label:
        instance.add_dynamic_partitions(external.LABEL, ["flux"])
        key = dg.MultiPartitionKey({"concept": "dog7", external.LABEL: "flux"})
    result = dg.materialize(
        EVERY,
        selection=[asset],
        partition_key=key if asset.partitions_def else None,
        resources={"workspace": Workspace(root=str(tmp_path))},
        instance=instance,
        raise_on_error=False,
    )
    failure = result.failure_data_for_node(asset.op.name)
    assert failure and failure.user_failure_data and "the disk is full" in (failure.user_failure_data.description or "")


# On the command line


def test_a_full_disk_is_told_on_the_command_line_without_a_traceback(monkeypatch, capsys, tmp_path):
    def full(store: Store, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "data/comparison")

    monkeypatch.setattr(steps, "compare", full)
    monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(tmp_path), "compare"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("personalize: the disk is full (data/comparison): free some space")
    assert len(complaint.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback_on_the_command_line(monkeypatch, tmp_path):
    def broken(store: Store, *arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(steps, "compare", broken)
    monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(tmp_path), "compare"])
    with pytest.raises(ZeroDivisionError):
        command_line.main()
