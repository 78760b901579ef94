"""A whole search on tiny models: what it asks for, what it reads, what it leaves, and that it goes on where it was."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import yaml

from personalize_core.cli import main as command_line
from personalize_core.cli import tuning as command
from personalize_core.errors import InputError
from personalize_core.metrics.parquet import meanings_in, read_parquet
from personalize_core.tuning import measuring, results
from personalize_core.tuning import tune as tuning
from personalize_core.tuning.budget import Budget
from personalize_core.tuning.request import Request, request
from personalize_core.tuning.search import COMPLETE, DIVERGED, PRUNED, Journal
from personalize_core.tuning.space import space_of
from personalize_core.tuning.tune import tune
from personalize_core.tuning.winner import Verdict
from personalize_core.workspace.params import Params
from personalize_core.workspace.recipes import recipe_of
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.tuning import searched
from tests.tuning.searched import HELD_BACK, METHOD, MINUTES, ON, TODAY, by_identity, by_steps, left, pretended

pytestmark = pytest.mark.usefixtures("short_checks")
BETTER = Verdict(0.1, 0.01, 0.02, 4, True)


@pytest.fixture(autouse=True, scope="module")
def seconds_by_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "seconds_of", by_steps)
        yield


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four concepts, and nothing done."""
    return searched.make(tmp_path_factory.mktemp("fresh"))


_opened_while_searching: list[str] = []
_is_searching = False


def _hear(event: str, arguments: tuple) -> None:
    if _is_searching and event == "open":
        _opened_while_searching.append(str(arguments[0]))


sys.addaudithook(_hear)


def spied(method):
    """A part of the search, with all that it opens written down."""

    def call(self):
        global _is_searching
        _is_searching = True
        try:
            return method(self)
        finally:
            _is_searching = False

    return call


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, fresh: Store) -> Path:
    """A workspace with a search that has ended and found a better recipe."""
    root = tiny_workspace.copy_of(fresh.root, tmp_path_factory.mktemp("ended")).root
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "judge", lambda today, found: BETTER)
        patch.setattr(tuning._Search, "_trials", spied(tuning._Search._trials))
        searched.search(root)
    return root


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(tuning, "measure", pretended)


def result_of(root: Path) -> dict:
    return json.loads((root / "data" / "tuning" / METHOD / "result.json").read_text())


# -- what is asked for -----------------------------------------------------------------------------------------


def test_by_default_the_first_half_by_name_is_tuned_on_and_the_others_held_back(fresh):
    asked = request(fresh, METHOD, 5)
    assert (list(asked.on), list(asked.report_on)) == (ON, HELD_BACK)


def test_of_one_set_that_is_named_the_other_is_the_rest(fresh):
    assert request(fresh, METHOD, 5, on=["rex"]).report_on == ("bob", "cup", "mug")
    assert request(fresh, METHOD, 5, report_on=["cup"]).on == ("bob", "mug", "rex")


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_time(fresh, minutes):
    with pytest.raises(InputError, match="a number of minutes above 0"):
        request(fresh, METHOD, minutes)


@pytest.mark.parametrize(
    "method, options, said",
    [
        ("base_model", {}, "learns nothing"),
        ("drembooth", {}, "there is no method 'drembooth'"),
        (METHOD, {"on": ["rex"], "report_on": ["rex", "cup"]}, "rex cannot be both"),
        (METHOD, {"on": ["bob", "cup", "mug", "rex"]}, "needs two at least"),
        (METHOD, {"on": ["max"]}, "there is no concept 'max'"),
        (METHOD, {"variant": "lag"}, "it has dreambooth"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(fresh, method, options, said):
    with pytest.raises(InputError, match=said):
        request(fresh, method, 5, **options)


def test_with_one_concept_it_says_how_to_add_another(tmp_path):
    store = tiny_workspace.make(tmp_path)
    (tmp_path / "data" / "concepts" / "cup" / "concept.yaml").rename(tmp_path / "cup.yaml")
    with pytest.raises(InputError, match="two at least, and there is only rex; add another with `personalize add"):
        request(store, METHOD, 5)


def test_several_concepts_may_stand_behind_one_option(fresh, monkeypatch, tmp_path):
    heard: list[Request] = []

    def stop(store, asked, *rest):
        heard.append(asked)
        raise InputError("enough")

    monkeypatch.setattr(tuning, "tune", stop)
    arguments = ["tune", METHOD, "--on", "rex", "bob", "--minutes", "2", "--report-on", "cup", "--report-on", "mug"]
    monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(fresh.root), *arguments])
    with pytest.raises(SystemExit):
        command_line.main()
    assert heard == [Request(METHOD, 2, ("rex", "bob"), ("cup", "mug"), METHOD)]


# -- the budget ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretending")
def test_too_small_a_budget_is_refused_and_what_it_names_is_enough(fresh, tmp_path):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    with pytest.raises(InputError, match=r"--minutes 0\.8$"):  # 2 * (2 (3 + 1) s + 2 (6 + 1) s) = 44 s, rounded upwards
        searched.search(store.root, minutes=0.7)
    assert not (store.data / "tuning").exists()
    searched.search(store.root, minutes=0.8)
    assert len(result_of(store.root)["trials"]) >= 2


def test_by_what_was_recorded_it_is_refused_before_anything_is_trained(fresh, tmp_path, monkeypatch):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    monkeypatch.setattr(tuning.Recorded, "anything", True, raising=False)
    monkeypatch.setattr(tuning.Recorded, "__init__", lambda self, store: setattr(self, "store", store))
    monkeypatch.setattr(tuning.Recorded, "seconds_of_training", lambda self, method: 50.0)
    monkeypatch.setattr(tuning.Recorded, "seconds_an_image", lambda self, method, otherwise: 1.0)
    monkeypatch.setattr(tuning, "measure", None)  # nothing is measured
    # 2 concepts: 100 s of training and 8 images of 1 s; the longest training takes the double
    with pytest.raises(InputError, match=r"1\.8 min \(by earlier runs here\).* 3\.5 min.*--minutes 10\.6$"):
        searched.search(store.root, minutes=10)


@pytest.mark.parametrize("images, least", [(8, 0.8), (40, 1.3)])  # of bob 4: 44 s as after both concepts, and 76 s
def test_of_a_method_that_was_never_trained_here_the_first_concept_tells(fresh, tmp_path, monkeypatch, images, least):
    store, measured = tiny_workspace.copy_of(fresh.root, tmp_path), []
    monkeypatch.setattr(tuning._Search, "_images_of", lambda self, names: 4 if names == ["bob"] else images)

    def counted(scratch, method, concept, *rest, **options):
        measured.append(concept)
        return pretended(scratch, method, concept, *rest, **options)

    monkeypatch.setattr(tuning, "measure", counted)
    with pytest.raises(InputError, match=rf"\(by what bob took\).*--minutes {least}$"):
        searched.search(store.root, minutes=0.7)
    assert measured == ON[:1]


def test_a_trial_that_took_longer_than_its_first_concept_told_is_kept_for_a_larger_budget(
    fresh, tmp_path, pretending, monkeypatch
):
    """Bob's images seem to be all of them, so 40 s seem to do; the whole trial says 44 s."""
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    monkeypatch.setattr(tuning._Search, "_images_of", lambda self, names: 4)
    with pytest.raises(InputError, match=r"\(measured here\).*--minutes 0\.8$"):
        searched.search(store.root, minutes=0.7)
    (journal,) = store.data.glob(".work/tuning/*/*/journal.jsonl")
    assert [trial.state for trial in Journal(journal, space_of(recipe_of(store, METHOD))).trials] == [COMPLETE]


@pytest.mark.parametrize("seconds, is_enough", [(10.0, True), (20.0, False)])
def test_what_was_trained_but_never_sampled_is_reckoned_by_its_training_alone(
    fresh, tmp_path, pretending, seconds, is_enough
):
    """Two trials with repeats are 4 trainings of 3 steps and 4 of 6, and 8 times 4 images of no known time."""
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    costs, config = store.training_costs(METHOD, "bob"), store.artifact(METHOD, "bob") / "config.json"
    for path, record in (costs, {"training_seconds": seconds}), (config, {"config": {"steps": 3}}):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    if is_enough:
        searched.search(store.root, minutes=2.1)
        return
    with pytest.raises(InputError, match=r"by earlier runs here.*--minutes 4$"):
        searched.search(store.root, minutes=2.1)


def test_the_search_keeps_to_its_budget(ended):
    result = result_of(ended)
    seconds = result["measured_seconds"]
    assert len(result["trials"]) > 2
    assert seconds["trials"] == sum(trial["seconds"] for trial in result["trials"])
    assert seconds["trials"] + seconds["repeats"] <= 60 * MINUTES
    assert seconds["repeats"] == 2 * (result["today"]["steps"] + 1) + 2 * (result["found"]["steps"] + 1)


# -- what it reads and leaves ----------------------------------------------------------------------------------


def test_no_file_of_a_held_back_concept_is_opened_while_it_searches(ended):
    parts = [set(Path(path).parts) for path in _opened_while_searching]
    assert any(ON[0] in each for each in parts) and any(ON[1] in each for each in parts)
    assert [each for each in parts if each & set(HELD_BACK)] == []


def test_nothing_of_it_stands_among_the_users_results(fresh, ended):
    made = {path.name for path in (ended / "data").iterdir() if path.name != ".work"}
    assert made == {"concepts", "prompts", "latents", "class_images", "costs", "tuning"}
    costs = {path.relative_to(ended / "data" / "costs").as_posix() for path in (ended / "data" / "costs").rglob("*")}
    assert costs == {"making", "making/tuning", f"making/tuning/{METHOD}.json"}
    assert (ended / "params.yaml").read_bytes() == (fresh.root / "params.yaml").read_bytes()


def test_only_the_best_trial_keeps_its_weights(ended):
    """And of its trainings not those that were repeated, of which the search keeps what was measured."""
    best, trials = result_of(ended)["best"], ended / "data" / ".work" / "tuning"
    weights = [path.relative_to(trials).parts[2:] for path in trials.rglob("weights.safetensors")]
    places = {("trials", f"{best:03d}", "data", "artifacts", METHOD, concept) for concept in (*ON, *HELD_BACK)}
    assert {path[:-1] for path in weights} == places


def test_tables_tell_all_trials_and_what_their_columns_mean(ended):
    folder, result = ended / "data" / "tuning" / METHOD, result_of(ended)
    trials = read_parquet(folder / "trials.parquet")
    assert meanings_in(folder / "trials.parquet").keys() == set(trials.columns)
    whole = trials.filter(concept="all concepts")
    assert whole["trial"].to_list() == list(range(len(result["trials"])))
    assert whole["balance"].to_list() == [trial["balance"] for trial in result["trials"]]
    assert whole["lr"][0] == TODAY and whole["steps"][0] == 3  # today's
    complete = trials.filter(state=COMPLETE)
    for (number,), own in complete.group_by("trial"):
        parts, together = own.filter(pl.col("concept") != "all concepts"), own.filter(concept="all concepts")
        assert sorted(parts["concept"]) == ON
        assert together["balance"].item() == pytest.approx(parts["balance"].mean()), number
        assert together["low"].item() <= together["balance"].item() <= together["high"].item()
    report = read_parquet(folder / "report.parquet")
    assert set(report["concept"]) == {*HELD_BACK, "all concepts"}
    rows = report.filter(score="balance")
    means = rows.filter(pl.col("concept") != "all concepts")
    assert rows.filter(concept="all concepts")["difference"].item() == pytest.approx(means["difference"].mean())


def test_the_section_is_ready_for_params_yaml_and_says_by_what_evidence(ended, tmp_path):
    text, result = (ended / "data" / "tuning" / METHOD / "recipe.yaml").read_text(), result_of(ended)
    values = yaml.safe_load((ended / "params.yaml").read_text())
    pasted = yaml.safe_load(text)
    assert set(pasted) == {"methods"} and set(pasted["methods"]) == {METHOD}
    values["methods"] |= pasted["methods"]
    before = Params.read(ended / "params.yaml").config(METHOD)
    after = Params.read(tiny_workspace.write_params(tmp_path, values).root / "params.yaml").config(METHOD)
    assert after == replace(before, **result["found"]["changes"]) != before
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert f"trial {result['best']} of {len(result['trials'])}" in comments[0] and "1 minutes" in comments[0]
    assert "bob and cup" in comments[1] and "+0.1000" in comments[1] and "0.0100" in comments[1]
    assert "mug and rex" in comments[2] and f"{result['differences']['balance']['mean']:+.4f}" in comments[2]
    both = yaml.safe_load((ended / "params.yaml").read_text()) | {
        "ablations": {f"{METHOD}@tuned": pasted["methods"][METHOD]}
    }
    params = Params.read(tiny_workspace.write_params(tmp_path, both).root / "params.yaml")
    assert params.config(f"{METHOD}@tuned") == after and params.config(METHOD) == before
    assert f"under `ablations` instead, as {METHOD}@tuned." in comments[3]


@pytest.mark.usefixtures("pretending")
def test_where_the_gain_is_within_the_noise_todays_recipe_stays(fresh, tmp_path, monkeypatch):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    monkeypatch.setattr(tuning, "judge", lambda today, found: Verdict(0.1, 0.2, 0.02, 4, False))
    folder = searched.search(store.root)
    assert result_of(store.root)["answer"] == "keep today's recipe"
    assert not (folder / "recipe.yaml").exists()
    assert "keep today's recipe: balance +0.1000" in results.in_words(results.read(folder))[1]


@pytest.mark.usefixtures("pretending")
def test_where_no_trial_is_better_nothing_is_repeated_or_reported(fresh, tmp_path, monkeypatch):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    monkeypatch.setattr(tuning, "best_of", lambda trials: trials[0])
    searched.search(store.root)
    result = result_of(store.root)
    assert (result["answer"], result["found"], result["verdict"]) == ("keep today's recipe", None, None)
    assert result["measured_seconds"]["repeats"] == result["measured_seconds"]["report"] == 0


@pytest.mark.usefixtures("pretending")
def test_a_search_finds_the_better_rate_and_says_so(fresh, tmp_path):
    """Best is 1e-3, today's is six times that: the balance is 0.078 below. Noise between seeds is 0.02."""
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    searched.search(store.root, minutes=3.0, repeats=2)
    result = result_of(store.root)
    assert result["answer"] == "change the recipe"
    assert 3e-4 < result["found"]["changes"]["lr"] < 3e-3
    assert result["verdict"]["gain"] > result["verdict"]["least"] > 0
    assert result["differences"]["balance"]["mean"] > 0.03


# -- trials that end early -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretending")
def test_a_training_that_diverges_is_the_worst_trial_and_does_not_end_the_search(fresh, tmp_path, monkeypatch):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)

    def diverging(scratch, method, concept, listener, heard=None, keep=True):
        if "001" in scratch.root.parts and concept == ON[1]:
            raise FloatingPointError("the loss is no number")
        return pretended(scratch, method, concept, listener)

    monkeypatch.setattr(tuning, "measure", diverging)
    said: list[str] = []
    tune(store, request(store, METHOD, MINUTES), say=said.append)
    trials = result_of(store.root)["trials"]
    assert (trials[1]["state"], trials[1]["balance"], trials[1]["concepts"]) == (DIVERGED, 0.0, 1)
    assert "Trial 1 diverged: the loss is no number" in said
    assert len(trials) > 2


@pytest.mark.usefixtures("pretending")
def test_a_pruned_trial_is_measured_on_no_further_concept(fresh, tmp_path, monkeypatch):
    store = tiny_workspace.copy_of(fresh.root, tmp_path)
    monkeypatch.setattr(tuning.Suggestion, "is_hopeless", lambda self, values: self.number == 1)
    searched.search(store.root)
    trials = result_of(store.root)["trials"]
    assert [trial["concepts"] for trial in trials] == [1 if number == 1 else 2 for number in range(len(trials))]
    assert trials[1]["state"] == PRUNED


def test_a_trial_may_end_half_way_through_a_training_by_what_probes_see(tmp_path, monkeypatch):
    store = searched.make(tmp_path, probed=True)
    looked: list[tuple[int, list[float]]] = []

    def looks_hopeless(self, seen):
        looked.append((self.number, list(seen)))
        return self.number == 1 and len(seen) == 2

    for module in (tuning, measuring):
        monkeypatch.setattr(module, "balance_of_probe", by_identity)
    monkeypatch.setattr(tuning.Suggestion, "looks_hopeless", looks_hopeless)
    # so that no third trial follows
    monkeypatch.setattr(tuning, "seconds_until_it_ended", lambda scratch, method, concept: 90.0)
    monkeypatch.setattr(tuning, "best_of", lambda trials: trials[0])
    monkeypatch.setattr(tuning._Search, "give_back_disk", lambda self: None)
    searched.search(store.root, minutes=2.0)
    trials = result_of(store.root)["trials"]
    assert [(trial["state"], trial["concepts"]) for trial in trials] == [(COMPLETE, 2), (PRUNED, 1)]
    assert trials[1]["seconds"] == trials[1]["steps"] + 1 + 90
    # what is kept of a training is what was seen while it ran
    first, second = looked[1][1]
    assert looked[0] == (0, [first]) and first != second
    kept = sorted(tmp_path.rglob("000/measured/*/*/half_way.json"))
    assert [json.loads(path.read_text())["balance"] for path in kept] == [first, second]
    roots = tmp_path.rglob("001/data/artifacts/*/*/weights.safetensors")
    assert [path.parent.name for path in roots] == [ON[0]]


# -- going on --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_trained(monkeypatch):
    def never(*args):
        raise AssertionError("something is trained")

    monkeypatch.setattr(measuring, "train", never)


@pytest.mark.usefixtures("nothing_trained")
def test_a_search_that_has_ended_starts_nothing_when_it_is_run_again(ended):
    before = left(ended)
    searched.search(ended)
    assert left(ended) == before


def test_without_its_result_it_ends_at_the_same_trial_again(ended, tmp_path, monkeypatch):
    """A kill between the end of the last trial and the writing of the result."""
    root = tmp_path / "copy"
    shutil.copytree(ended, root, symlinks=True)
    before = left(root)
    for path in (root / "data" / "tuning" / METHOD).iterdir():
        path.unlink()
    monkeypatch.setattr(tuning, "judge", lambda today, found: BETTER)

    def never(*args):
        raise AssertionError("something is trained")

    monkeypatch.setattr(measuring, "train", never)
    searched.search(root)
    assert left(root).keys() == before.keys()
    assert {name: content for name, content in left(root).items() if before[name] != content} == {}


@pytest.mark.usefixtures("pretending")
def test_a_suggestion_that_does_not_fit_ends_no_search(fresh, tmp_path, monkeypatch):
    """A search ends where not even the shortest recipe would fit with the repeats."""
    root, answers, has_room_for = tiny_workspace.copy_of(fresh.root, tmp_path).root, [], Budget.has_room_for

    def spied_upon(*asked, **also):
        answers.append(has_room_for(*asked, **also))
        return answers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Budget, "has_room_for", spied_upon)
        searched.search(root)
    assert any(answers[answers.index(False) :])  # behind one that does not fit comes one that does
    (path,) = (root / "data" / ".work" / "tuning" / METHOD).glob("*/journal.jsonl")
    recipe = recipe_of(Store(root), METHOD)
    trials = Journal(path, space_of(recipe)).trials
    budget = Budget(60 * MINUTES, 1, recipe, space_of(recipe))
    shortest = {name: within.low for name, within in budget.space.items()}
    assert not budget.has_room_for(shortest, trials)


@pytest.mark.usefixtures("pretending")
def test_with_a_larger_budget_it_goes_on_and_with_the_smaller_one_it_ends_where_it_had(fresh, tmp_path):
    root = tiny_workspace.copy_of(fresh.root, tmp_path).root
    searched.search(root)
    small = result_of(root)
    searched.search(root, minutes=1.5 * MINUTES)
    large = result_of(root)
    assert len(large["trials"]) > len(small["trials"])
    assert large["trials"][: len(small["trials"])] == small["trials"]
    searched.search(root)
    assert result_of(root)["trials"] == small["trials"]


def test_the_table_of_trials_is_printed(ended, capsys):
    result = results.read(ended / "data" / "tuning" / METHOD)
    command._print_trials(result)
    command._print_report(result)
    printed = capsys.readouterr().out
    assert "0 (today's)" in printed and f"{result['best']} (best)" in printed
    assert "Held back: mug, rex" in printed
    assert f"{result['differences']['balance']['mean']:+.4f}" in printed
