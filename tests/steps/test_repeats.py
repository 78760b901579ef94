"""What training again with another seed tells, and what everything cost."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from torch import nn

from personalize_core import steps
from personalize_core.errors import InputError
from personalize_core.files.stamps import Stamp
from personalize_core.metrics import costs, parquet, ranking, tables
from personalize_core.report import comparison_in_words
from personalize_core.report.display_names import in_words
from personalize_core.steps import sampling
from personalize_core.steps.repeating import check_repeatable, find_trainings
from personalize_core.training import run_costs
from personalize_core.training.run_costs import PeakMemory, Stopwatch, TimedCheckpoints
from personalize_core.training.watcher import Watched
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.steps.test_steps import bytes_under

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

METHOD = "personalized_residuals"
CHAIN = (steps.train, steps.sample_grid, steps.score)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on one concept, one of them trained twice more, and all compared."""
    store = tiny_workspace.make(tmp_path_factory.mktemp("repeated"))
    for method in ("base_model", METHOD):
        for one in CHAIN:
            one(store, "rex", method)
    shutil.copytree(store.data, store.root / "before", ignore=shutil.ignore_patterns(".work"))
    for number in (1, 2):
        for one in CHAIN:
            one(store.again(number), "rex", METHOD)
    steps.compare(store)
    return store.root


@pytest.fixture
def store(repeated: Path, tmp_path: Path) -> Store:
    shutil.copytree(repeated / "data", tmp_path / "data")
    shutil.copy(repeated / "params.yaml", tmp_path / "params.yaml")
    return Store(tmp_path)


def weights(store: Store) -> bytes:
    return (store.artifact(METHOD, "rex") / "weights.safetensors").read_bytes()


def noise(store: Store) -> dict[str, dict]:
    rows = comparison_in_words.training_noise(store.comparison()).filter(variant=METHOD)
    return rows.rows_by_key("metric", named=True, unique=True)


# -- repeats ---------------------------------------------------------------------------------------------------------


def test_a_repeat_learns_otherwise_and_changes_nothing_that_was_there(repeated: Path, store: Store):
    before = bytes_under(repeated / "before")
    now = bytes_under(store.data)
    assert {name: now[name] for name in before} == before
    assert len({weights(store.again(number)) for number in (0, 1, 2)}) == 3
    seeds = [
        json.loads((store.again(number).artifact(METHOD, "rex") / "config.json").read_text())["seed"]
        for number in (0, 1, 2)
    ]
    assert seeds == [5, 6, 7]
    assert all(one(store.again(1), "rex", METHOD).skipped for one in CHAIN)


def test_a_repeat_learns_what_the_method_learns_under_that_seed_and_is_sampled_from_the_same_noise(store: Store):
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    assert json.loads((store.again(1).grid(METHOD, "rex") / "grid.json").read_text())["seed"] == values["seed"]
    learned, values["seed"] = weights(store.again(1)), values["seed"] + 1
    other = tiny_workspace.write_params(store.root, values)
    steps.train(other, "rex", METHOD)
    assert weights(other) == learned


def test_the_comparison_holds_the_noise_between_trainings_by_metric(store: Store):
    found = noise(store)
    assert {"clip_t", "clip_i", "dino"} <= set(found)
    means = []
    for number in (0, 1, 2):
        table = tables.read(store.again(number).scores(METHOD, "rex") / "scores.parquet")
        means.append(float(table.filter(metric="dino", variant=METHOD)["score"].to_numpy().mean()))
    row = found["dino"]
    assert (row["trainings"], row["concepts"]) == (3, 1)
    assert row["between"] == pytest.approx(torch.tensor(means, dtype=torch.float64).std().item(), rel=1e-9)
    heading, *lines = comparison_in_words.table(store.comparison(), store.costs())
    (line,) = [line for line in lines if line[0] == in_words(METHOD)]
    assert line[heading.index("DINO")].endswith(f"noise {row['between']:.3f}")


def test_the_verdicts_count_the_noise_of_training(store: Store):
    pairs = parquet.read_parquet(store.comparison() / "pairs.parquet").filter(metric="dino", other=METHOD)
    assert pairs["training_noise"].to_list() == pytest.approx([noise(store)["dino"]["between"]])
    shutil.rmtree(store.data / "repeats")
    steps.compare(store)
    without = parquet.read_parquet(store.comparison() / "pairs.parquet").filter(metric="dino", other=METHOD)
    assert without["training_noise"].null_count() == 1 and without["error"][0] < pairs["error"][0]
    assert noise_is_gone(store)


def noise_is_gone(store: Store) -> bool:
    return comparison_in_words.training_noise(store.comparison()).is_empty()


def test_without_repeats_a_comparison_is_what_it_is_with_repeats_that_were_taken_away(repeated: Path, store: Store):
    shutil.rmtree(store.data / "repeats")
    shutil.rmtree(store.comparison())
    steps.compare(store)
    plain = Store(store.root.with_name("plain"))
    shutil.copytree(repeated / "before", plain.data)
    shutil.copy(repeated / "params.yaml", plain.root)
    steps.compare(plain)
    assert bytes_under(plain.comparison()) == bytes_under(store.comparison())


def test_a_repeat_of_another_artifact_counts_no_more_and_is_listed(store: Store):
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    values["methods"][METHOD][values["base_model"]]["lr"] = 0.5
    changed = tiny_workspace.write_params(store.root, values)
    for one in CHAIN:
        one(changed, "rex", METHOD)
    steps.compare(changed)
    assert noise_is_gone(changed)
    summary = json.loads((changed.comparison() / "summary.json").read_text())
    assert summary["trainings_left_out"] == [f"{METHOD}/rex, training {number}" for number in (1, 2)]
    assert not steps.train(changed.again(1), "rex", METHOD).skipped  # and can be made anew


@pytest.mark.parametrize("lost", ["artifact", "grid"])
def test_a_repeat_whose_parts_do_not_follow_from_one_another_counts_no_more(lost, store: Store):
    cells = [(METHOD, "rex")]
    (found,), _ = find_trainings(store, cells)
    assert sorted(found.stores) == [0, 1, 2]
    shutil.rmtree(getattr(store.again(1), lost)(METHOD, "rex"))
    (found,), left_out = find_trainings(store, cells)
    assert sorted(found.stores) == [0, 2] and left_out == [f"{METHOD}/rex, training 1"]


def test_what_has_no_seed_to_change_is_not_repeated(store: Store):
    with pytest.raises(InputError, match="base_model learns nothing"):
        check_repeatable(store, ["rex"], ["base_model"])
    path = store.artifact(METHOD, "rex") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imported": "rex.safetensors"}))
    with pytest.raises(InputError, match="was imported; how it was trained is not known here"):
        check_repeatable(store, ["rex"], [METHOD])


# -- costs -----------------------------------------------------------------------------------------------------------


def test_what_was_measured_stands_outside_of_all_that_is_the_same_every_time(store: Store):
    training, sampling = (
        json.loads(place(METHOD, "rex").read_text()) for place in (store.training_costs, store.sampling_costs)
    )
    assert training["training_seconds"] > 0 and training["peak_memory_bytes"] > 1e6
    assert set(sampling["seconds_per_image"]) == {METHOD, f"{METHOD}_lag"}
    assert all(seconds > 0 for seconds in sampling["seconds_per_image"].values())
    assert training["memory_of"].startswith("resident set of the process") and "CPU" in training["device"]
    assert not store.training_costs("base_model", "rex").exists()  # it trains nothing
    for folder in (store.artifact(METHOD, "rex"), store.grid(METHOD, "rex"), store.comparison()):
        assert not folder.resolve().is_relative_to((store.data / "costs").resolve())
    summary = pl.read_parquet(store.comparison() / "summary.parquet")
    assert not set(summary.columns) & set(costs.MEASURED)


def test_the_same_run_twice_gives_the_same_bytes_though_it_takes_another_time(repeated: Path, tmp_path: Path):
    other = Store(tmp_path)
    shutil.copy(repeated / "params.yaml", tmp_path / "params.yaml")
    for name in ("prompts", "concepts"):
        shutil.copytree(repeated / "data" / name, tmp_path / "data" / name)
    for number in (0, 1):
        for one in CHAIN:
            one(other.again(number), "rex", METHOD)
    now = bytes_under(tmp_path / "data")
    there = bytes_under(repeated / "data")
    assert {name: content for name, content in there.items() if name in now} == now
    assert any(name.startswith(f"repeats/1/metrics/{METHOD}") for name in now)
    times = [Store(root).training_costs(METHOD, "rex").read_bytes() for root in (repeated, tmp_path)]
    assert times[0] != times[1]


def test_costs_stand_in_the_row_that_people_see(store: Store):
    found = parquet.read_parquet(store.costs())
    row = found.filter(variant=METHOD, concept=tables.ALL_CONCEPTS).row(0, named=True)
    assert row["training_seconds"] > 0 and row["seconds_per_image"] > 0 and row["parameters"] > 0
    heading, *lines = comparison_in_words.table(store.comparison(), store.costs())
    by_variant = {line[0]: line[heading.index("Cost")] for line in lines}
    assert by_variant[in_words(METHOD)] == costs.in_words(row)
    assert "trained" not in by_variant["base model"] and "an image" in by_variant["base model"]
    assert by_variant["real images"] == "-" if "real images" in by_variant else True


def test_what_was_measured_of_another_result_counts_as_unknown(store: Store):
    for place in (store.training_costs, store.sampling_costs):
        path = place(METHOD, "rex")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"stamp": "another"}))
    steps.compare(store)
    row = parquet.read_parquet(store.costs()).filter(variant=METHOD, concept="rex").row(0, named=True)
    assert all(row[name] is None for name in (*costs.MEASURED, *costs.WORDS)) and row["parameters"] > 0
    store.training_costs(METHOD, "rex").write_text("{")
    steps.compare(store)


def test_costs_are_said_as_far_as_they_are_known():
    row = dict.fromkeys(costs.ALL_COLUMNS)
    assert costs.in_words(row) == "-"
    row |= {"parameters": 1_210_000.0, "artifact_bytes": 4_840_000.0, "training_seconds": 41.4}
    row |= {"seconds_per_image": 0.42, "training_memory_bytes": 1.2e9, "sampling_memory_bytes": 9e8}
    assert costs.in_words(row) == "1.21 M trained, 4.84 MB, 41 s training, 0.42 s an image, 1.2 GB at most"


def test_the_time_of_a_resumed_run_is_that_of_all_its_sessions(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_costs.time, "monotonic", lambda: now[0])
    method = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(method.parameters())

    def session(start: int, steps_done: int, save_after: tuple[int, ...]) -> TimedCheckpoints:
        now[0] += 100  # loading
        checkpoints = TimedCheckpoints(tmp_path, "stamp", watch=Stopwatch(since=now[0]))
        now[0] += 50  # reading the checkpoint
        resumed = checkpoints.load()
        assert resumed.step == start
        for step in range(start, start + steps_done):
            now[0] += 2
            checkpoints.watch.lap()
            now[0] += 5
            checkpoints.probed(5)
            if step + 1 in save_after:
                now[0] += 7  # the loop's own
                checkpoints.save((0, step + 1), method, optimizer, [], Watched())  # type: ignore[arg-type]
                checkpoints.writes.wait()
        return checkpoints

    def seconds(steps: int) -> dict[str, object]:
        return {"training_seconds": pytest.approx(2 * steps), "probe_seconds": pytest.approx(5 * steps)}

    assert session(0, 3, (2,)).costs == seconds(3)
    assert session(2, 5, (4, 6)).costs == seconds(7)  # the step that was lost counts once
    last = session(6, 4, ())
    assert last.costs == seconds(10)
    last.laps.unlink()
    assert session(6, 1, ()).costs == {}  # not 0, and not too little
    last.clear()
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_that_of_what_came_after_where_the_system_can_forget_what_came_before(tmp_path, monkeypatch):
    status, reset = tmp_path / "status", tmp_path / "clear_refs"
    monkeypatch.setattr(run_costs, "_STATUS", status)
    monkeypatch.setattr(run_costs, "_RESET", reset)

    def resident(peak: int, now: int) -> None:
        status.write_text(f"Name:\tpython\nVmHWM:\t{peak} kB\nVmRSS:\t{now} kB\nThreads:\t1\n")

    resident(peak=400, now=398)  # the peak was reset; a page or two came since
    memory = PeakMemory("cpu")
    assert reset.read_text() == "5"
    resident(peak=600, now=400)
    assert memory.costs()["peak_memory_bytes"] == 600 * 1024
    assert memory.costs()["memory_of"] == "resident set of the process"

    resident(peak=600, now=400)  # what was written was taken and nothing reset
    assert PeakMemory("cpu").costs()["memory_of"] == "resident set of the process since it started"


def test_the_peak_counts_what_was_held_and_let_go():
    memory = PeakMemory("cpu")
    # Pages of its own: an allocator would hand out again what tests before this one let go.
    with mmap.mmap(-1, 200_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"1" * len(held))
        resident = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    peak = memory.costs()["peak_memory_bytes"]
    assert peak > 0.99 * int(resident[0].split()[1]) * 1024 > 200e6  # the system counts both roughly


def test_noise_is_of_no_more_concepts_than_were_repeated(store: Store):
    assert "concepts" in ranking.NOISE_COLUMNS
    meanings = parquet.meanings_in(store.comparison() / comparison_in_words.NOISE)
    assert meanings["concepts"] == ranking.NOISE_COLUMNS["concepts"]


def test_what_sampling_took_is_recorded_before_the_grid_appears(tmp_path, monkeypatch):
    """A run that is killed as soon as its grid is there makes no new one, and so would never record it."""
    store = tiny_workspace.make(tmp_path)
    steps.train(store, "rex", "base_model")
    recorded, begin = [], sampling.making

    @contextmanager
    def making(store: Store, folder: Path, stamp: Stamp) -> Iterator[Path]:
        with begin(store, folder, stamp) as new:
            yield new
            recorded.append(store.sampling_costs("base_model", "rex").is_file() and not folder.exists())

    monkeypatch.setattr(sampling, "making", making)
    steps.sample_grid(store, "rex", "base_model")
    assert recorded == [True]
