"""How the command line prints: results to stdout, words to stderr, progress as bars or lines, nothing that harms."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table

PLAIN_SECONDS = 5  # between two lines of progress where there is no terminal
WIDE = 10_000  # columns of a table that goes to a file


class Words(Console):
    """A console whose listener may go: what is at work goes on."""

    def on_broken_pipe(self) -> None:
        """Fall silent, where rich would end the process."""
        self.quiet = True


words = Words(stderr=True, highlight=False, markup=False, emoji=False)
results = Console(highlight=False, markup=False, emoji=False)


def plain(text: object) -> str:
    """Return a text in which everything that a terminal would obey is escaped: file names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def say(text: object) -> None:
    """Print words to stderr, at once and unbroken."""
    with suppress(OSError, ValueError):  # stderr is closed, or a file on a full disk
        words.print(plain(text), soft_wrap=True)


def give(text: object) -> None:
    """Print a line of results to stdout."""
    print(plain(text))


def give_json(values: object) -> None:
    """Print results as JSON to stdout."""
    print(json.dumps(values, indent=1, allow_nan=False))


def show_table(rows: Sequence[Mapping[str, object]], console: Console = results) -> None:
    """Print rows of the same keys as a table; what is too wide for a terminal is folded, and never cut."""
    if not rows:
        say("Nothing to list.")
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*[cell(value) for value in row.values()])
    show(table, console)


def show_facts(facts: Mapping[str, object]) -> None:
    """Print named facts as a table of two columns."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, cell(value))
    show(table, results)


def show(table: Table, console: Console) -> None:
    """Print a table, as wide as it likes where there is no terminal."""
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def cell(value: object) -> str:
    """Return a value as the text of a table's cell."""
    if isinstance(value, list | tuple):
        return plain(" ".join(map(str, value)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else plain("any" if value is None else value)


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


Show = Callable[..., None]  # (what, done, total, note="")


@contextmanager
def progress() -> Iterator[Show]:
    """Yield a function that shows progress: as bars on a terminal, else as a line every few seconds."""
    if not words.is_terminal:
        yield plain_progress()
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeftColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=words) as bars:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int, note: str = "") -> None:
            if what not in rows:
                rows[what] = bars.add_task(what, total=total, completed=done, note=note)
            bars.update(rows[what], completed=done, total=total, note=note)

        yield show


def plain_progress() -> Show:
    """Return a function that says progress in a line every few seconds, and when all is done."""
    begun: dict[str, tuple[int, float]] = {}
    said = time.monotonic()

    def show(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        first, since = begun.setdefault(what, (done, now))
        if done < total and now - said < PLAIN_SECONDS:
            return
        said = now
        left = (now - since) / max(done - first, 1) * (total - done)
        say(", ".join(filter(None, (f"{what} {done}/{total}", note, f"{duration(left)} left" if done < total else ""))))

    return show
