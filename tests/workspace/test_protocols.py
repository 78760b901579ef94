"""Protocols: what is drawn of which concept and how; results of two protocols never meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from personalize_core import steps
from personalize_core.concepts.prompt_lists import read_list
from personalize_core.errors import InputError
from personalize_core.metrics import parquet, tables
from personalize_core.workspace.protocols import Protocol
from personalize_core.workspace.recipes import check_concepts_wanted, concepts_wanted, prompts_of
from personalize_core.workspace.store import Store
from tests import tiny_workspace
from tests.steps.test_steps import bytes_under

pytestmark = pytest.mark.usefixtures("short_checks", "no_scatter_plot")

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "data" / "protocols").glob("*.yaml"))
SHORT = {
    "title": "short",
    "source": "this test",
    "sampler": "ddim",
    "steps": 3,
    "guidance": 2.0,
    "images_per_prompt": 1,
    "prompts": "two",
}
METHOD = "textual_inversion"


def write_protocol(store: Store, name: str = "short", **changes) -> Store:
    """The workspace under a protocol; a change to None leaves the key out."""
    path = store.data / "protocols" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in (SHORT | changes).items() if value is not None}))
    return Store(store.root, name)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One method on one of two concepts, drawn and scored as params.yaml says."""
    store = tiny_workspace.make(tmp_path_factory.mktemp("sampled"))
    for one in (steps.train, steps.sample_grid, steps.score):
        one(store, "rex", METHOD)
    return store.root


@pytest.fixture
def store(sampled: Path, tmp_path: Path) -> Store:
    shutil.copytree(sampled / "data", tmp_path / "data")
    shutil.copy(sampled / "params.yaml", tmp_path / "params.yaml")
    return Store(tmp_path)


# -- the files that come with the project ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_protocol_that_comes_along_is_sound_and_says_where_it_is_from(path):
    store = Store(REPOSITORY, path.stem)
    protocol = store.described_protocol
    assert protocol and protocol.source and protocol.notes and protocol.encoders
    if protocol.collection:
        assert not store.prompt_collection(protocol.collection).exists()  # never shipped
    else:
        for concept in store.concept_names():
            assert prompts_of(store, concept).templates


def test_the_prompts_of_attn_dreambooths_figures_are_five_for_each_of_its_ten_concepts_and_six_for_any():
    protocol = Store(REPOSITORY, "attn_dreambooth_complex").described_protocol
    assert protocol
    *of_nouns, of_others = protocol.prompts
    lists = [read_list(REPOSITORY / "data" / "prompts" / f"{each.name}.txt") for each in of_nouns]
    assert sum(map(len, lists)) == 50 and {len(prompts) for prompts in lists} == {5, 10}
    chosen = prompts_of(Store(REPOSITORY, "attn_dreambooth_complex"), "dog1")
    assert chosen.name == "attn_dreambooth_dog" and not chosen.without_identity
    others = prompts_of(Store(REPOSITORY, "attn_dreambooth_complex"), "robot1")
    assert others.name == of_others.name == "attn_dreambooth_probes" and len(others.templates) == 6


def test_of_cores_figures_identity_skips_what_its_metrics_leave_out():
    chosen = prompts_of(Store(REPOSITORY, "core_complex"), "dog1")
    assert len(chosen.templates) == 26 and chosen.without_identity == set(range(6))
    assert chosen.templates[5].endswith("in the style of Monet") and chosen.templates[6].endswith("sitting on a stool.")


def test_the_published_protocols_are_all_there():
    names = {path.stem for path in FILES}
    published = {"textual_inversion", "dreambooth", "customconcept101", "personalized_residuals", "oft", "neti", "vico"}
    of_figures = {"attn_dreambooth_complex", "core_complex"}
    assert names == published | of_figures | {"attn_dreambooth", "core", "faces", "mini", "quick"}


def test_dreambooth_has_thirty_subjects_and_a_list_for_live_ones():
    store = Store(REPOSITORY, "dreambooth")
    assert len(concepts_wanted(store)) == 30
    of = {name: prompts_of(store, name) for name in ("cat1", "dog1", "teapot1")}
    assert [of[name].name for name in of] == ["dreambooth_live", "dreambooth_live", "dreambooth_object"]
    assert all(len(prompts.templates) == 25 for prompts in of.values())


def test_core_leaves_the_last_six_of_twenty_prompts_out_of_identity():
    store = Store(REPOSITORY, "core")
    for name, chosen in (("dog1", "core_animate"), ("teapot1", "core_inanimate")):
        prompts = prompts_of(store, name)
        assert (prompts.name, len(prompts.templates)) == (chosen, 20)
        assert prompts.without_identity == set(range(14, 20))


def test_the_stand_in_for_prompts_that_were_not_found_is_called_one():
    store = Store(REPOSITORY, "attn_dreambooth")
    assert len(prompts_of(store, "dog1").templates) == 24
    assert "OURS" in store.prompts("attndreambooth_standin").read_text().splitlines()[0]
    assert store.described_protocol and "NOT FOUND" in store.described_protocol.notes[0]


def test_vico_has_eight_images_of_dreambooths_prompts_for_its_own_were_not_found():
    store = Store(REPOSITORY, "vico")
    protocol = store.described_protocol
    assert protocol and "NOT FOUND" in protocol.notes[0]
    published = "--n_samples 4 --n_iter 2 --scale 7.5 --ddim_steps 50 --ddim_eta 0.0".split()
    assert protocol.images_per_prompt == int(published[1]) * int(published[3])
    assert [protocol.guidance, protocol.steps, protocol.eta] == [float(value) for value in published[5::2]]
    for concept in ("dog1", "teapot1"):
        assert prompts_of(store, concept) == prompts_of(Store(REPOSITORY, "dreambooth"), concept)


# -- reading one -----------------------------------------------------------------------------------------------------


def refusal(store: Store, **changes) -> str:
    before = bytes_under(store.data)
    with pytest.raises(InputError) as refused:
        under = write_protocol(store, **changes)
        before["protocols/short.yaml"] = (store.data / "protocols" / "short.yaml").read_bytes()
        steps.check_inputs(under, ["rex"], [METHOD])
        steps.sample_grid(under, "rex", METHOD)
    assert bytes_under(store.data) == before  # nothing was made, and nothing overwritten
    return str(refused.value).removeprefix(f"{store.data / 'protocols' / 'short.yaml'}: ")


def test_a_protocol_replaces_how_images_are_sampled_and_scored_and_nothing_else(store: Store):
    measured = {"text_image": ["other-clip"], "identity": ["other-dino"], "segmenter": None, "texts": ["class_phrase"]}
    under = write_protocol(store, sampler="dpm-solver++", encoders=measured, seed=77)
    assert (under.params.sampling.sampler, under.params.sampling.steps) == ("dpm-solver++", 3)
    assert under.params.encoders.model_dump() == measured | {"masc": None}
    back = {"sampling": store.params.sampling, "encoders": store.params.encoders}
    assert under.params.model_copy(update=back) == store.params
    assert (under.sampling_seed, under.training_seed) == (77, store.params.seed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": "no_such"}, "there is no prompt list 'no_such'"),
        ({"step": 3}, "there is no key 'step'; known are sampler, steps"),
        ({"title": None}, "the key 'title' is missing"),
        ({"eta": 1.5}, "eta = 1.5: "),
        ({"eta": 1.0, "sampler": "dpm-solver++"}, "eta = 1.0 is an option of ddim; dpm-solver++ adds no noise"),
        ({"collection": "x"}, "write either prompts or a collection"),
        ({"prompts": None}, "write either prompts or a collection"),
        ({"prompts": [{"name": "two", "concepts": ["rex"]}]}, "the last list, and only that one, must be for all"),
        ({"prompts": [{"name": "two"}, {"name": "two"}]}, "the last list, and only that one, must be for all"),
        ({"prompts": [{"name": "two", "without_identity": [3]}]}, "has 2 prompts, and no row 3"),
    ],
)
def test_what_is_wrong_with_a_protocol_is_said_and_nothing_is_overwritten(changes, said, store: Store):
    assert said in refusal(store, **changes)


def test_an_unknown_protocol_is_refused_with_the_known_ones(store: Store):
    write_protocol(store, "full")
    write_protocol(store, "long")
    with pytest.raises(InputError, match="no protocol 'ful' in .*; there are full and long"):
        Store(store.root, "ful").params  # noqa: B018


def test_a_protocol_that_names_a_concept_that_is_not_here_is_refused(store: Store):
    under = write_protocol(store, concepts=["rex", "backpack_dog"])
    with pytest.raises(InputError, match="protocol 'short' is about 2 concepts, and .* lacks backpack_dog; add each"):
        check_concepts_wanted(under)
    assert concepts_wanted(write_protocol(store, concepts="all")) == ["cup", "rex"]


def test_lists_that_may_not_be_shipped_are_read_from_where_the_user_puts_them(store: Store):
    under = write_protocol(store, prompts=None, collection="theirs")
    folder = store.data / "prompts" / "theirs"
    with pytest.raises(InputError, match=f"noncommercial research only; .* copy or link .* to {folder}"):
        steps.check_inputs(under, ["rex"], [METHOD])
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "dog.txt").write_text("a {} asleep \na {} awake\n")
    catalogue = [{"instance_data_dir": "./benchmark_dataset/rex", "prompt_filename": "prompts/dog.txt"}]
    (folder / "dataset.json").write_text(json.dumps(catalogue))
    assert prompts_of(under, "rex").templates == ["a {} asleep", "a {} awake"]
    assert concepts_wanted(under) == ["rex"]
    with pytest.raises(InputError, match="protocol 'short' has no prompts for 'cup'; .* one of its names: rex"):
        steps.check_inputs(under, ["cup"], [METHOD])
    (folder / "dataset.json").write_text('{"concepts": 3}')
    with pytest.raises(InputError, match="dataset.json is in another format"):
        concepts_wanted(under)


def test_a_concept_is_sampled_in_the_list_of_its_name_or_of_its_kind(store: Store):
    for name in ("live", "named"):
        (store.data / "prompts" / f"{name}.txt").write_text("a {} \n")
    lists = [{"name": "live", "class_nouns": ["dog"]}, {"name": "named", "concepts": ["cup"]}, {"name": "two"}]
    under = write_protocol(store, prompts=lists)
    assert [prompts_of(under, name).name for name in ("rex", "cup")] == ["live", "named"]
    under = write_protocol(store, prompts=lists[1:])
    assert prompts_of(under, "rex").name == "two"


# -- results ---------------------------------------------------------------------------------------------------------


def test_results_of_a_protocol_lie_beside_the_others_and_share_the_artifact(store: Store):
    before = {name: bytes_under(store.data / name) for name in ("artifacts", "grids", "metrics")}
    under = write_protocol(store)
    assert steps.train(under, "rex", METHOD).skipped
    steps.sample_grid(under, "rex", METHOD)
    steps.score(under, "rex", METHOD)
    report = steps.compare(under)
    assert report.path == store.data / "under" / "short" / "comparison"
    summary = json.loads((report.path / "summary.json").read_text())
    assert summary["protocol"] == "short" and set(summary["means"]) == {METHOD}
    table = tables.read(report.path / "scores.parquet")
    assert table["image"].str.starts_with("data/under/short/grids/").all()
    assert {name: bytes_under(store.data / name) for name in before} == before
    assert steps.sample_grid(store, "rex", METHOD).skipped  # neither redraws the other
    assert steps.sample_grid(under, "rex", METHOD).skipped
    about = json.loads((under.grid(METHOD, "rex") / "grid.json").read_text())
    assert (about["protocol"], about["prompts"], about["sampling"]["eta"]) == ("short", "two", 0.0)


def test_images_that_were_sampled_otherwise_stand_in_no_comparison(store: Store):
    steps.compare(store)
    values = yaml.safe_load((store.root / "params.yaml").read_text())
    values["sampling"]["guidance"] = 7.0
    changed = tiny_workspace.write_params(store.root, values)
    before = bytes_under(store.comparison())
    with pytest.raises(InputError, match="all that has been scored .* was sampled otherwise than params.yaml says now"):
        steps.compare(changed)
    assert bytes_under(store.comparison()) == before
    for one in (steps.train, steps.sample_grid, steps.score):
        one(changed, "rex", "base_model")
    steps.compare(changed)
    summary = json.loads((changed.comparison() / "summary.json").read_text())
    assert set(summary["means"]) == {"base_model"} and f"{METHOD}/rex" in summary["missing"]


def test_identity_skips_the_prompts_that_the_protocol_excludes_and_text_does_not(store: Store):
    whole, part = (
        write_protocol(store, name, prompts=[{"name": "two", "without_identity": rows}])
        for name, rows in (("whole", []), ("part", [2]))
    )
    scored = []
    for under in (whole, part):
        steps.sample_grid(under, "rex", METHOD)
        scored.append(tables.read(steps.score(under, "rex", METHOD).path).drop("image"))
    skipped = pl.col("metric").is_in(["clip_i", "dino"]) & (pl.col("prompt_index") == 1)
    assert len(scored[0].filter(skipped)) == 2
    assert scored[1].equals(scored[0].filter(~skipped))
    steps.compare(part)
    summary = parquet.read_parquet(part.comparison() / "summary.parquet")
    means = summary.filter(pl.col("concept") == "rex").select("metric", "prompts").rows()
    texts = ["clip_t", "clip_t_scaled", "clip_t_slot_deleted", "clip_t_slot_deleted_scaled"]
    assert dict(means) == dict.fromkeys(texts, 2) | {"clip_i": 1, "dino": 1}


def test_another_exclusion_scores_again_and_samples_nothing(store: Store):
    under = write_protocol(store)
    for one in (steps.sample_grid, steps.score):
        one(under, "rex", METHOD)
    under = write_protocol(store, prompts=[{"name": "two", "without_identity": [1]}], notes=["said otherwise"])
    assert steps.sample_grid(under, "rex", METHOD).skipped
    assert not steps.score(under, "rex", METHOD).skipped


def test_a_protocols_seed_gives_other_noise_and_trains_nothing(store: Store):
    plain, seeded = write_protocol(store, "plain"), write_protocol(store, "seeded", seed=99)
    assert steps.train(seeded, "rex", METHOD).skipped
    grids = [steps.sample_grid(under, "rex", METHOD).path / METHOD / "00_00.png" for under in (plain, seeded)]
    assert grids[0].read_bytes() != grids[1].read_bytes()


def test_a_protocol_is_typed():
    assert Protocol.model_validate(SHORT | {"eta": 0.5}).how() == {
        "sampler": "ddim",
        "steps": 3,
        "guidance": 2.0,
        "eta": 0.5,
        "images_per_prompt": 1,
    }
