"""How far a study is, on a terminal: steps done of all runs' together, and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from noisytune_cli.cli.show import is_terminal


@contextmanager
def progress(total_steps: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar of steps with the time left on stderr; yield what to call with the steps just done.

    Without a terminal, or where not `enabled`, nothing is shown.
    """
    if not (enabled and total_steps and is_terminal(sys.stderr)):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("study"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        # A run's first steps say little about those of the other methods, so look far back.
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        speed_estimate_period=600.0,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("study", total=total_steps)
        yield lambda steps: bar.advance(task, steps)
