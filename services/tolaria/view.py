"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere.

A view hears two kinds of things: :mod:`services.tolaria.progress` messages of the training process and events of the
supervisor. It never decides anything.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.chassis.supervisor import Event, ServiceStatus, State
from services.tolaria.progress import (
    GROWN,
    DecisionProgress,
    EpochProgress,
    Progress,
    SeedProgress,
    StatusProgress,
    StepProgress,
)

_SPARKS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {
    State.SERVING: "green",
    State.EXTERNAL: "cyan",
    State.RESTARTING: "yellow",
    State.DOWN: "red",
}
_ENDS: Final = frozenset({"FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"})
_EPOCH_LINE_SECONDS: Final = 1.0
_SHOWN_SEEDS: Final = 8


class View(Protocol):
    """Who is told."""

    def start(self) -> None:
        """The run begins."""

    def hear(self, message: Progress) -> None:
        """The training process says something."""

    def mesh(self, event: Event) -> None:
        """Something happened to a child process."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def stop(self) -> None:
        """The run is over; what comes now is printed plainly."""


def sparkline(values: list[float], width: int = 40) -> str:
    """The last ``width`` values as bars between their least and greatest."""
    shown = values[-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(_SPARKS[round((value - low) / span * 7) if span else 3] for value in shown)


def slot_label(slot: str) -> str:
    """A slot's name without its collection."""
    return slot.rsplit("/", 1)[-1]


def describe(message: Progress) -> str | None:
    """A message as one plain line; None for what is not worth one."""
    match message:
        case EpochProgress():
            seeds = "  ".join(f"{state.lower()} {count}" for state, count in sorted(message.seeds.items()))
            return (
                f"[{message.arm}] epoch {message.epoch:>3}/{message.epochs}  loss {message.train_loss:.4f}  "
                f"validation {message.validation_accuracy:.2f} %  parameters {message.parameters:,}"
                + (f"  seeds: {seeds}" if seeds else "")
            )
        case SeedProgress(to_state="DORMANT"):
            return None
        case SeedProgress():
            return (
                f"{_of(message)}seed {message.seed} ({message.family} +{message.size} at {slot_label(message.slot)}): "
                f"{message.from_state} -> {message.to_state} at step {message.step}: {message.reason}"
            )
        case DecisionProgress():
            return (
                f"{_of(message)}Tamiyo ({message.latency_ms:.0f} ms) after epoch {message.epoch}: {message.explanation}"
            )
        case StatusProgress():
            return message.message
        case _:
            return None


def _of(message: SeedProgress | DecisionProgress) -> str:
    """Whose seed or decision it is, where that is not the run itself: its seeds have the same names."""
    return "" if message.arm == GROWN else f"[{message.arm}] "


def describe_event(event: Event) -> str | None:
    """A supervisor's event as one plain line; None for the everyday ones."""
    if event.kind in ("exited", "restarting", "gave_up") and event.detail != "exit code 0":
        return f"{event.name} {event.kind.replace('_', ' ')}: {event.detail}"
    return None


class PlainView:
    """One line per thing worth telling, of an arm's epochs one per second (its last always).

    ``verbose`` tells of every epoch, and of every event of the mesh.
    """

    def __init__(self, out: TextIO, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._verbose = verbose
        self._clock = clock
        self._arm = ""
        self._next_epoch_line = 0.0

    def start(self) -> None:
        """Nothing to set up."""

    def hear(self, message: Progress) -> None:
        """Print it if it is worth a line."""
        if isinstance(message, EpochProgress) and not self._epoch_is_due(message):
            return
        if (line := describe(message)) is not None:
            self.say(line)

    def _epoch_is_due(self, message: EpochProgress) -> bool:
        now = self._clock()
        due = self._verbose or message.arm != self._arm or now >= self._next_epoch_line
        if due:
            self._arm, self._next_epoch_line = message.arm, now + _EPOCH_LINE_SECONDS
        return due or message.epoch == message.epochs

    def mesh(self, event: Event) -> None:
        """Print what is out of the ordinary."""
        line = describe_event(event)
        if line is None and self._verbose:
            line = f"{event.name} {event.kind}: {event.detail}"
        if line is not None:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line."""
        self._out.write(text + "\n")
        self._out.flush()

    def stop(self) -> None:
        """Nothing to take down."""


class QuietView(PlainView):
    """Only what is said outright: the end, and errors."""

    def hear(self, message: Progress) -> None:
        """Not a word."""

    def mesh(self, event: Event) -> None:
        """Not a word."""


class LiveView:
    """A panel that redraws itself: where the run is, how it learns, what its seeds do, how the mesh is.

    What people want to find again later (decisions, ends of seeds, mishaps) scrolls away above it.
    """

    def __init__(self, out: TextIO, services: Mapping[str, ServiceStatus], *, run: str) -> None:
        self._services = services
        self._run = run
        self._arm = GROWN
        self._accuracy: dict[str, list[float]] = {}
        self._epoch: EpochProgress | None = None
        self._step: StepProgress | None = None
        self._decision: DecisionProgress | None = None
        self._seeds: dict[str, SeedProgress] = {}
        self._status = "starting"
        self._news: deque[str] = deque(maxlen=4)
        self._started = time.monotonic()
        self._console = Console(file=out)
        # Last: it draws itself once when it is made.
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def start(self) -> None:
        """Begin to draw."""
        self._live.start()

    def stop(self) -> None:
        """Draw no more; the panel goes away and leaves room for the result."""
        self._live.stop()

    def say(self, text: str) -> None:
        """A line above the panel."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def hear(self, message: Progress) -> None:
        """Take it into the picture."""
        match message:
            case EpochProgress():
                self._arm, self._epoch = message.arm, message
                self._accuracy.setdefault(message.arm, []).append(message.validation_accuracy)
            case StepProgress():
                self._arm, self._step = message.arm, message
            case SeedProgress(to_state="DORMANT"):
                pass  # its slot is free again; how the seed ended is what people want to see
            case SeedProgress():
                self._seeds = {seed: last for seed, last in self._seeds.items() if last.arm == message.arm}
                self._seeds[message.seed] = message
                if message.to_state in _ENDS:
                    self.say(str(describe(message)))
            case DecisionProgress():
                self._decision = message
                self.say(str(describe(message)))
            case StatusProgress():
                self._status = message.message
                if self._epoch is not None and message.state != "comparing":
                    self._news.append(message.message)
            case _:
                self._status = "done"

    def mesh(self, event: Event) -> None:
        """Remember what is out of the ordinary."""
        if (line := describe_event(event)) is not None:
            self._news.append(line)

    def render(self) -> RenderableType:
        """The panel as of now."""
        rows: list[RenderableType] = [self._progress(), self._learning()]
        if self._seeds:
            rows.append(self._seed_table())
        if self._decision is not None:
            rows.append(Text(f"last decision: {self._decision.explanation}", style="magenta", overflow="fold"))
        rows.append(self._mesh_line())
        rows.extend(Text(line, style="yellow") for line in self._news)
        seconds = time.monotonic() - self._started
        return Panel(Group(*rows), title=Text(f"Esper {self._run}"), subtitle=Text(f"{self._status} ({seconds:.0f} s)"))

    def _progress(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=8)
        grid.add_column(ratio=1)
        grid.add_column(justify="right")
        # Of a short epoch the end is news sooner than the next step.
        latest = max(
            (m for m in (self._step, self._epoch) if m is not None and m.arm == self._arm), key=_step, default=None
        )
        step, steps = (latest.step, latest.steps) if latest is not None else (0, 1)
        speed = f"  {self._step.steps_per_second:,.0f} steps/s" if self._step is not None else ""
        told = f"step {step:,} of {steps:,}{speed}" if latest is not None else "starting"
        grid.add_row(Text(self._arm, style="bold"), ProgressBar(total=steps, completed=step), told)
        return grid

    def _learning(self) -> RenderableType:
        if self._epoch is None:
            return Text("waiting for the first epoch", style="dim")
        epoch, text = self._epoch, Text()
        text.append(f"epoch {epoch.epoch}/{epoch.epochs}", style="bold")
        text.append(f"  loss {epoch.train_loss:.4f}  validation ")
        text.append(f"{epoch.validation_accuracy:.2f} %", style="bold green")
        text.append(f"  parameters {epoch.parameters:,}  ")
        text.append(sparkline(self._accuracy[epoch.arm]), style="cyan")
        return text

    def _seed_table(self) -> RenderableType:
        seeds = list(self._seeds.values())
        counts = Counter(seed.to_state for seed in seeds)
        table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left", title_style="")
        table.title = "seeds: " + ", ".join(f"{state} {count}" for state, count in sorted(counts.items()))
        for title in ("seed", "slot", "blueprint", "state", "worth (points)"):
            table.add_column(title)
        for seed in seeds[-_SHOWN_SEEDS:]:
            worth = "not measured"
            if seed.contribution is not None:
                worth = f"{seed.contribution['points']:+.2f}"
            table.add_row(
                Text(seed.seed), Text(slot_label(seed.slot)), Text(f"{seed.family} +{seed.size}"), seed.to_state, worth
            )
        return table

    def _mesh_line(self) -> RenderableType:
        text = Text()
        for service in self._services.values():
            style = _STATE_STYLES.get(service.state, "dim")
            restarts = f" ↻{service.restarts}" if service.restarts else ""
            text.append("● ", style=style)
            text.append(f"{service.name}{restarts}  ")
        return text


def _step(message: StepProgress | EpochProgress) -> int:
    return message.step
