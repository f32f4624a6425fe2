"""What a long command says while it runs, on standard error: what memory it needs, and bars with the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]

MEBIBYTE, GIBIBYTE = 2**20, 2**30


class Reporter:
    """Bars and lines on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def state_memory(self, parts_bytes: dict[str, int]) -> None:
        """Say what memory the command will need, before it takes any. Parts are held at the same time."""
        shown = ", ".join(f"{name} {_size(size)}" for name, size in parts_bytes.items())
        self.say(f"Needs about {_size(sum(parts_bytes.values()))} of memory: {shown}.")

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar of `total` units; yields what to call with the number of units just done."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)


def _size(count_bytes: int) -> str:
    if count_bytes >= GIBIBYTE:
        return f"{count_bytes / GIBIBYTE:.1f} GiB"
    return f"{count_bytes / MEBIBYTE:.0f} MiB"
