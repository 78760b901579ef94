"""The console command, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from personalize_core.cli import main as command_line

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def personalize_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], Run]:
    """Of a workspace: run the command there; (exit status, what it printed, what it complained)."""

    def command(root: Path) -> Run:
        def run(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["personalize", "--root", str(root), *arguments])
            with pytest.raises(SystemExit) as stopped:
                command_line.main()
            printed = capsys.readouterr()
            return int(stopped.value.code or 0), printed.out, printed.err

        return run

    return command
