"""The command that searches a method's recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from personalize_core.cli.terminal import print_line, print_paths, print_table, progress, short

app = typer.Typer()

SEVERAL = ("--on", "--report-on")


class SeveralValues(TyperCommand):
    """`--on a b c` is `--on a --on b --on c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for word in args:
            if word.startswith("-"):
                option = word if word in SEVERAL else ""
                spread.append(word)
            else:
                spread += [option, word] if option and spread[-1] != option else [word]
        return super().parse_args(ctx, spread)


@app.command(cls=SeveralValues)
def tune(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="A method, or METHOD@ABLATION.")],
    minutes: Annotated[
        float, typer.Option(help="The budget: minutes of training, sampling and scoring, of trials and repeats.")
    ] = 30.0,
    on: Annotated[
        list[str] | None, typer.Option(help="Concepts to tune on. Default: the first half of them by name.")
    ] = None,
    report_on: Annotated[
        list[str] | None,
        typer.Option(help="Concepts that are held back, and reported on. Default: the others."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="A sampling variant of params.yaml. Default: the method's first.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often the best recipe and today's are trained again, for the noise.")
    ] = 1,
) -> None:
    """Search a method's recipe for a better one.

    Tries learning rates and numbers of steps on some concepts, and compares the best recipe with today's on others.
    params.yaml stays as it is: what was found is written as a section for it. A search that was cut off goes on where
    it was.
    """
    from personalize_core.files.bounds import size_of
    from personalize_core.tuning import results
    from personalize_core.tuning.request import request
    from personalize_core.tuning.tune import kept_bytes
    from personalize_core.tuning.tune import tune as search

    store = context.obj
    asked = request(store, method, minutes, on or (), report_on or (), variant, repeats)
    with progress() as listener:
        folder = search(store, asked, listener, print_line)
    result = results.read(folder)
    _print_trials(result)
    for line in results.in_words(result):
        print_line(line)
    if result["found"]:
        _print_report(result)
    print_line(f"The trials keep {size_of(kept_bytes(store, method))} in {short(store.work('tuning', method))}.")
    print_paths("Written", [(path.name, path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"])


def _print_trials(result: dict[str, Any]) -> None:
    names = list(result["space"])
    rows = []
    for trial in result["trials"]:
        interval = "" if trial["low"] is None else f" [{trial['low']:.4f}, {trial['high']:.4f}]"
        state = f"{trial['state']} after {trial['concepts']}" if trial["state"] != "complete" else "complete"
        number = f"{trial['trial']}" + (" (today's)" if trial["trial"] == 0 else "")
        number += " (best)" if trial["trial"] == result["best"] and trial["trial"] else ""
        values = [f"{trial['changes'][name]:g}" for name in names]
        balance = f"{trial['balance']:.4f}{interval}" if trial["state"] == "complete" else "-"
        rows.append((number, *values, balance, f"{trial['seconds']:.0f} s", state))
    print_table(("Trial", *names, "Balance [95 % interval]", "Took", "State"), rows)


def _print_report(result: dict[str, Any]) -> None:
    today, found = result["today"], result["found"]
    rows = []
    for name, words in (("balance", "balance"), ("identity", "DINO"), ("text", "CLIP-T")):
        difference = result["differences"].get(name)
        said = "-"
        if difference:
            said = f"{difference['mean']:+.4f}"
            if difference["low"] is not None:
                said += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
        rows.append((words, f"{today[name]:.4f}", f"{found[name]:.4f}", said))
    rows.append(("steps", str(today["steps"]), str(found["steps"]), f"{found['steps'] - today['steps']:+d}"))
    seconds = today["training_seconds"], found["training_seconds"]
    rows.append(("seconds of a training", *(f"{each:.0f}" for each in seconds), f"{seconds[1] - seconds[0]:+.0f}"))
    concepts = ", ".join(result["reported_on"])
    print_table((f"Held back: {concepts}", "Today's", "Found", "Difference [95 % interval]"), rows)
