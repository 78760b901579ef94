"""dvc.yaml runs what is out of date, and nothing else. The commands are stand-ins; DVC is real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
import pytest
import yaml
from dvc.repo import Repo

from personalize_core.workspace.stamps import sources as sources_of
from personalize_core.workspace.store import Store
from pipelines.assets import chain
from pipelines.presentation.lineage import dvc_hash
from tests import tiny_workspace
from tests.in_dagster import materialize

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's use of pygtrie

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "personalize_core" / "report"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ALL_METHODS = list(yaml.safe_load((ROOT / "params.yaml").read_text())["methods"])
# dvc.yaml has a stage for each method of params.yaml, whichever those are; each costs seconds in every test below.
METHODS = ["textual_inversion", "dreambooth"]
CONFIG = ROOT / ".dvc" / "config"

STAND_IN = '''
"""Writes, for each step, a file that depends on what the real step depends on."""
import sys
from pathlib import Path

import yaml

name, method = sys.argv[2], sys.argv[4] if len(sys.argv) > 4 else ""
params = yaml.safe_load(Path("params.yaml").read_text())
ways = [recipe.get("rotate") for section in params["methods"].values() for recipe in section.values()]
out, content = {
    "encode-images": ("latents", [sorted(path.read_text() for path in Path("data/concepts").rglob("*.png")), ways]),
    "train": (f"artifacts/{method}", params["methods"].get(method)),
    "sample": (f"grids/{method}", [params["sampling"], params["variants"].get(method), method]),
    "score": (f"metrics/{method}", params["encoders"]),
    "score-references": ("metrics/real_images", params["encoders"]),
    "score-external": ("external_columns", params["encoders"]),
    "compare": ("comparison", "all"),
    "report": ("report", "all"),
}[name]
inputs = {"sample": "artifacts", "score": "grids"}
if name in inputs:
    content = [content, Path(f"data/{inputs[name]}/{method}/out").read_text()]
Path("data", out).mkdir(parents=True, exist_ok=True)
Path("data", out, "out").write_text(repr(content))
if name == "compare":
    steps = params["methods"]["dreambooth"]["mini"]["steps"]
    Path("data", out, "summary.json").write_text('{"means": {"dreambooth": {"dino": %f}}}' % (steps / 1000))
    Path("data", out, "identity_vs_text.png").write_text("an image")
'''


class Workspace:
    """A copy of the project, as far as DVC looks at it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # .gitignore too: else DVC writes some of its own, into folders that other stages depend on
        for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.params = yaml.safe_load((root / "params.yaml").read_text())
        self.params["methods"] = {name: self.params["methods"][name] for name in METHODS}
        self.write_params()
        prompts = self.params["sampling"]["prompts"]
        for name in (*sources(), f"data/prompts/{prompts}.txt", "data/concepts/dog7/00.png", "data/external/README.md"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                kept = (
                    path if path.suffix else path / "kept"
                )  # git, from which experiments start, keeps no empty folder
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(f"# {name}\n")
        (root / "personalize_core" / "__init__.py").touch()
        (root / "personalize_core" / "__main__.py").write_text(STAND_IN)
        subprocess.run(["git", "init", "--quiet", str(root)], check=True)

    @classmethod
    def at(cls, root: Path) -> Workspace:
        """One that is there already."""
        workspace = cls.__new__(cls)
        workspace.root = root
        return workspace

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(self.root / ".dvc" / "site"),
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",  # as here: more threads add up in another order, to other bytes
        }

    def repro(self) -> set[str]:
        """The stages that ran, by `dvc repro` in this process, which has imported DVC."""
        with patch.dict(os.environ, self.environment), chdir(self.root), Repo() as repo:
            reproduce: Any = repo.reproduce  # a function of DVC's that its class takes for a method
            return {stage.addressing for stage in reproduce()}

    def dvc(self, *arguments: str) -> str:
        command, environment = [sys.executable, "-m", "dvc", *arguments], os.environ | self.environment
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def edit(self, section: str, key: str, value: object) -> None:
        self.params[section][key] = value
        self.write_params()

    def write_params(self) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))


def dependencies(stage: str, method: str = "") -> set[str]:
    described = STAGES[stage].get("do", STAGES[stage])
    return {dependency.replace("${key}", method).replace("${item.method}", method) for dependency in described["deps"]}


def sources() -> set[str]:
    """Every source file or folder that some stage depends on."""
    of_stages = {name for stage in STAGES for method in ALL_METHODS for name in dependencies(stage, method)}
    return {name for name in of_stages if name.startswith("personalize_core")}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Everything made once. The tests below follow one another in it, as a day's work does."""
    workspace = Workspace(tmp_path_factory.mktemp("dvc"))
    ran = workspace.repro()
    assert ran == {
        "encode_images",
        "score_references",
        "score_external",
        "compare",
        "report",
        *(f"{stage}@{method}" for stage in ("train", "sample", "score") for method in METHODS),
    }
    return workspace


def of(*methods: str) -> set[str]:
    """A change in these methods' results reaches their own stages, the comparison and the report."""
    return {f"{stage}@{method}" for stage in ("train", "sample", "score") for method in methods} | {"compare", "report"}


@pytest.mark.slow
def test_a_second_time_there_is_nothing_to_do(workspace):
    assert workspace.repro() == set()


@pytest.mark.slow
def test_a_change_of_one_methods_parameters_runs_its_own_stages_and_the_comparison(workspace):
    workspace.edit("methods", "dreambooth", {"mini": {"steps": 7}})
    assert workspace.repro() == of("dreambooth") | {"encode_images"}  # which finds all latents there


@pytest.mark.slow
def test_another_way_to_prepare_concept_images_encodes_them_and_scores_its_own_method_alone(workspace):
    workspace.edit("methods", "textual_inversion", {"mini": {"rotate": True}})
    ran = workspace.repro()
    everywhere = {f"{stage}@{method}" for stage in ("train", "sample") for method in METHODS}  # decide by their stamps
    assert ran == everywhere | {"encode_images", "score@textual_inversion", "compare", "report"}


@pytest.mark.slow
def test_a_change_of_one_methods_source_trains_no_other(workspace):
    source = workspace.root / "personalize_core" / "methods" / "textual_inversion" / "method.py"
    source.write_text("# changed\n")
    ran = workspace.repro()
    assert {name for name in ran if "@" in name} == {"train@textual_inversion", "sample@textual_inversion"}


@pytest.mark.slow
def test_a_change_of_the_sampling_trains_nothing(workspace):
    workspace.edit("sampling", "steps", 3)
    ran = workspace.repro()
    of_methods = {name for method in METHODS for name in of(method)} - {f"train@{method}" for method in METHODS}
    assert ran == of_methods | {"score_external"}  # which finds all up to date: no prompt without identity is another


@pytest.mark.slow
def test_a_new_concept_reaches_every_stage(workspace):
    photo = workspace.root / "data" / "concepts" / "cat2" / "00.png"
    photo.parent.mkdir()
    photo.write_text("a concept image")
    ran = workspace.repro()
    assert {"encode_images", "score_references", "score_external"} < ran and {
        f"train@{method}" for method in METHODS
    } < ran


@pytest.mark.slow
def test_checkpoints_and_caches_are_in_no_output(workspace):
    outs = [name for stage in STAGES.values() for out in stage.get("do", stage)["outs"] for name in out]
    assert not [out for out in outs if out.startswith("data/.work")]
    assert all(out[name]["persist"] for s in STAGES.values() for out in s.get("do", s)["outs"] for name in out)


@pytest.mark.slow
def test_an_ablation_that_is_named_for_dvc_is_a_stage_of_its_own(workspace):
    stages = workspace.root / "dvc.yaml"
    named = "ablation_stages: { without_prior: { method: dreambooth, ablation: without_prior } }"
    stages.write_text(stages.read_text().replace("ablation_stages: {}", named))
    assert workspace.repro() == {"ablation@without_prior", "compare", "report"}
    assert (workspace.root / "data" / "grids" / "dreambooth@without_prior" / "out").is_file()
    assert workspace.repro() == set()
    # a section of `ablations` leaves DVC's stages as they were, also where its name has an @ and is one's own
    workspace.edit("ablations", "dreambooth@short", {"mini": {"steps": 3}})
    stages.write_text(
        stages.read_text().replace(
            "ablation: without_prior }", "ablation: without_prior }, short: { method: dreambooth, ablation: short }"
        )
    )
    assert {"ablation@short", "compare"} <= workspace.repro() and workspace.repro() == set()
    workspace.edit("ablations", "dreambooth@short", {"mini": {"steps": 4}})
    again = workspace.repro()
    assert {"ablation@short", "compare"} <= again and not [name for name in again if name.startswith("train@")]


@pytest.mark.slow
def test_an_experiment_is_run_compared_and_shown(workspace):
    named = (["config", "user.name", "a"], ["config", "user.email", "a@b.c"])
    for arguments in (*named, ["add", "--all"], ["commit", "--quiet", "--message", "before"]):
        subprocess.run(["git", "-C", str(workspace.root), *arguments], check=True)
    done = workspace.dvc("exp", "run", "--name", "shorter", "-S", "methods.dreambooth.mini.steps=3")
    ran = set(re.findall(r"Running stage '(.*?)'", done))
    assert {name for name in ran if name.startswith("train@")} == {"train@dreambooth"} and "compare" in ran
    assert "Ran experiment" in done
    assert "0.003" in workspace.dvc("metrics", "show")
    shown = json.loads(workspace.dvc("metrics", "diff", "HEAD", "--json"))
    found = shown["data/comparison/summary.json"]["means.dreambooth.dino"]
    assert found == pytest.approx({"old": 0.007, "new": 0.003, "diff": -0.004})
    assert "shorter" in workspace.dvc("exp", "show", "--csv")
    page = workspace.dvc("plots", "show")
    assert (workspace.root / "dvc_plots" / "index.html").is_file() and "dvc_plots" in page


@pytest.mark.slow
def test_what_was_made_is_pushed_to_a_folder_and_pulled_from_it(workspace, tmp_path):
    before = {path: path.read_bytes() for path in (workspace.root / "data").rglob("*") if path.is_file()}
    workspace.dvc("remote", "add", "--force", "--default", "shelf", str(tmp_path / "shelf"))
    assert "pushed" in workspace.dvc("push")
    for name in ("data/latents", "data/artifacts", "data/grids", "data/metrics", "data/comparison", ".dvc/cache"):
        shutil.rmtree(workspace.root / name)
    workspace.dvc("pull")
    assert {path: path.read_bytes() for path in (workspace.root / "data").rglob("*") if path.is_file()} == before
    assert workspace.repro() == set()


@pytest.mark.slow
def test_a_concept_of_ones_own_is_versioned_by_dvc_and_known_by_the_same_hash(workspace):
    folder = workspace.root / "data" / "concepts" / "own"
    (folder / "masks").mkdir(parents=True)
    for name in ("00.png", "b.png", "ä.png", "masks/00.png", "concept.yaml"):
        (folder / name).write_text(f"bytes of {name}")
    workspace.dvc("add", "data/concepts/own")
    (out,) = yaml.safe_load((workspace.root / "data" / "concepts" / "own.dvc").read_text())["outs"]
    assert out["md5"] == dvc_hash(folder)
    (folder / "00.png").write_text("another")
    assert out["md5"] != dvc_hash(folder)
    workspace.dvc("checkout", "--force", "data/concepts/own.dvc")
    assert out["md5"] == dvc_hash(folder) and (folder / "00.png").read_text() == "bytes of 00.png"


# The real steps, through both entry points.


@pytest.mark.slow
def test_what_dvc_made_dagster_finds_done_and_what_dagster_makes_dvc_finds_done(instance, tmp_path, real_loss_curve):
    """Tiny models. First DVC makes everything; then Dagster, after all of it has been thrown away."""
    store = tiny_workspace.make(tmp_path)
    shutil.rmtree(store.concept_folder("cup"))
    values = tiny_workspace.params(tmp_path)
    values["methods"] = {"textual_inversion": values["methods"]["textual_inversion"]}
    store = tiny_workspace.write_params(
        tmp_path,
        values
        | {
            "variants": {},
            "ablations": {},
            "gradient_checkpointing": False,
            "probes": {"share": 0.05},
            "optimizer": "adamw",
            "compile": False,
            "image_size": None,
            "baseline": "base_model",
            "held_out": 0,
        },
    )
    values = yaml.safe_load((tmp_path / "params.yaml").read_text()) | {"precision": "fp32", "judge": None}
    tiny_workspace.write_params(tmp_path, values)  # dvc.yaml names every section
    shutil.copytree(ROOT / "personalize_core", tmp_path / "personalize_core", copy_function=os.link)
    shutil.copytree(ROOT / "data" / "external", tmp_path / "data" / "external")
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=lambda folder, names: {*names} - {"config"})
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    by_dvc = Workspace.at(tmp_path)
    assert "train@textual_inversion" in by_dvc.repro()
    made = results(store)
    lock = yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]
    hashes = {dep["path"]: dep["md5"] for stage in lock.values() for dep in stage["deps"]}

    found = through_dagster(store, instance)
    assert all(metadata["skipped"].value for metadata in found.values())
    assert results(store) == made
    assert found["comparison"]["dvc/metrics"].value == hashes["data/metrics"]
    assert found["report"]["dvc/comparison"].value == hashes["data/comparison"]

    for folder in ("latents", "artifacts", "grids", "metrics", "comparison", "report", "costs"):
        shutil.rmtree(store.data / folder)
    found = through_dagster(store, instance)
    assert not any(metadata["skipped"].value for metadata in found.values())
    assert results(store) == made
    assert by_dvc.repro() <= {"report"}  # which tells how long all of it took, so it differs
    assert "up to date" in by_dvc.dvc("status")


def results(store: Store) -> dict[str, bytes]:
    """Without what differs from run to run, and the report, which tells of it."""
    return {
        path.relative_to(store.data).as_posix(): path.read_bytes()
        for path in sorted(store.data.rglob("*"))
        if path.is_file() and not {".work", "costs", "report", ".gitignore"} & {*path.parts}
    }


def through_dagster(store: Store, instance: dg.DagsterInstance) -> dict[str, Mapping[str, Any]]:
    """Asset -> the metadata of its materialization."""
    found = {}
    pair = dg.MultiPartitionKey({"concept": "rex", "method": "textual_inversion"})
    for selection, key in (
        ([chain.latents, chain.reference_scores], "rex"),
        ([chain.artifact, chain.image_grid, chain.metrics], pair),
        ([chain.comparison, chain.report], None),
    ):
        done = materialize(instance, store.root, selection, key)
        for event in done.get_asset_materialization_events():
            found[event.materialization.asset_key.to_user_string()] = event.materialization.metadata
    return found


# A step's stamp and its stage depend on the same sources.


def files(modules) -> set[str]:
    """A module is a file, or a folder of texts; what is no module is called as its file."""
    paths = [f"personalize_core/{module}" for module in modules]
    return {path if (ROOT / path).exists() else f"{path}.py" for path in paths}


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        ("encode_images", sources_of.ENCODING),
        (
            "train",
            {*sources_of.TRAINING, *sources_of.SAMPLING, *sources_of.ENCODING},
        ),  # class images are sampled while training
        ("sample", {*sources_of.SAMPLING, *sources_of.REFINING}),
        ("score", sources_of.SCORING),
        ("score_references", sources_of.SCORING),
        ("score_external", {*sources_of.SCORING, *sources_of.EXTERNAL}),
        (
            "ablation",
            {
                *sources_of.TRAINING,
                *sources_of.SAMPLING,
                *sources_of.ENCODING,
                *sources_of.REFINING,
                *sources_of.SCORING,
            },
        ),
        ("compare", sources_of.COMPARING),
        ("report", {*sources_of.REPORTING, *(f"report/{path.stem}" for path in REPORT.glob("*.py"))}),
    ],
)
def test_a_stage_depends_on_the_sources_that_its_step_depends_on(stage, modules):
    depends = dependencies(stage, "dreambooth")
    missing = {name for name in files(modules) if not depends & {name, *map(str, Path(name).parents)}}
    assert not missing
    assert "personalize_core/methods/dreambooth" in depends or stage not in {"train", "sample", "ablation"}


def test_what_decides_how_concept_images_are_prepared_encodes_them_anew():
    assert {"base_model", "methods"} <= set(STAGES["encode_images"]["params"])


def test_every_source_that_a_stage_depends_on_is_there():
    assert not [name for name in sources() if not (ROOT / name).exists()]


def test_dvc_speaks_to_nobody_and_adds_nothing_to_git():
    assert "analytics = false" in CONFIG.read_text() and "autostage = false" in CONFIG.read_text()
