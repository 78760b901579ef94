"""How long commands take that compute nothing, as ratios to `python -c "import torch"` in the same run.

    python benchmarks/start_up.py [--runs 5] [--only WORDS] [--results FOLDER]

Commands that need results get them: two concepts by the embedded base model, with trainings of two steps, in a
temporary copy of the workspace, which takes a minute or two. A workspace in which `make demo` has run serves as well.
All processes run one after another, in rounds, so that a
busy machine slows all of them alike; the medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONCEPTS = ("backpack1", "teapot1")
METHODS = ("base_model", "textual_inversion")
TORCH = ("import torch", ["-c", "import torch"], None)
CELL = """
from pathlib import Path
import pipelines.assets  # what a run of Dagster imports, dagster itself aside
from personalize_core import steps
from personalize_core.workspace.store import Store
store = Store(Path.cwd())
steps.check_inputs(store, ["backpack1"], ["textual_inversion"])
assert not steps.plan(store, ["backpack1"], ["textual_inversion"])
for step in (steps.train, steps.sample_grid, steps.score):
    assert step(store, "backpack1", "textual_inversion").skipped
"""


def commands(results: Path) -> list[tuple[str, list[str], Path | None, float]]:
    """(what, arguments of python, where, the most that it may take of `import torch`)."""
    core = ["-m", "personalize_core"]
    cells = [*core, "run", *CONCEPTS, *(word for name in METHODS for word in ("-m", name))]
    return [
        ("--help", [*core, "--help"], ROOT, 0.25),
        ("base-models", [*core, "base-models"], ROOT, 0.25),
        ("protocols", [*core, "protocols"], ROOT, 0.25),
        ("explain", [*core, "explain", f"data/metrics/{METHODS[1]}/{CONCEPTS[0]}"], results, 0.5),
        ("plan, 8 concepts x all methods", [*core, "plan"], ROOT, 0.75),
        ("run, four cells up to date", cells, results, 1.5),
        ("a cell up to date, without dagster", ["-c", CELL], results, 1.0),
    ]


def make_results(folder: Path) -> None:
    """Four small cells with everything that `run` makes of them."""
    for name in CONCEPTS:
        shutil.copytree(ROOT / "data" / "concepts" / name, folder / "data" / "concepts" / name)
    shutil.copytree(ROOT / "data" / "prompts", folder / "data" / "prompts")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["methods"] = {"base_model": {"mini": {}}, "textual_inversion": {"mini": {"steps": 2}}}
    values |= {"ablations": {}, "variants": {}, "automation": {}}
    values["sampling"] |= {"steps": 2, "images_per_prompt": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    subprocess.run([sys.executable, "-m", "personalize_core", "run"], cwd=folder, env=environment(), check=True)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def seconds(arguments: list[str], where: Path | None) -> float:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=where or ROOT, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds; the table shows medians")
    parser.add_argument("--only", default="", help="measure commands whose name contains this")
    parser.add_argument("--results", type=Path, help="a workspace in which everything is up to date")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = options.results or Path(folder)
        measured = [each for each in commands(results) if options.only in each[0]]
        if not options.results and any(where == results for _, _, where, _ in measured):
            make_results(results)
        taken: dict[str, list[float]] = {}
        for _ in range(options.runs):
            for what, arguments, where in [TORCH, *(each[:3] for each in measured)]:
                taken.setdefault(what, []).append(seconds(arguments, where))
    torch = statistics.median(taken["import torch"])
    print(f"import torch: {torch:.2f} s, the median of {options.runs}\n")
    print("| command | seconds | of import torch | at most |\n|---|---|---|---|")
    for what, _, _, most in measured:
        median = statistics.median(taken[what])
        print(f"| {what} | {median:.2f} | {median / torch:.2f} | {most} |")


if __name__ == "__main__":
    main()
