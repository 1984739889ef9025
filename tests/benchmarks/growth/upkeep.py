"""What the platform costs a run beside the growth itself, in a table from the committed JSON. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

_VERDICTS: Final = {True: "yes", False: "no", None: "not shown"}
_HEAD: Final = """Each benchmark says in its JSON, in `docs/benchmarks/`, how it measures, and on what machine.
Differences are in percent of a control in the same run, with 95 % bootstrap intervals; one is within its limit if its
whole interval is."""

_Row: TypeAlias = tuple[str, str, str, str]


def section(folder: Path) -> str | None:
    """The table; None where nothing of it was measured."""
    rows = [row for name, rows_of in _ROWS.items() for row in rows_of(_read(folder / f"{name}.json"))]
    if not rows:
        return None
    head = ["| what | measured | limit | within it |", "|---|---|---|---|"]
    return "\n".join([_HEAD, "", *head, *(f"| {' | '.join(row)} |" for row in rows)])


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _startup(found: Mapping[str, Any]) -> Iterator[_Row]:
    if found:
        first, bare = (found[key]["median"] for key in ("first_step_seconds", "control_seconds"))
        measured = f"{first:.1f} s, {bare:.1f} s of them what a bare PyTorch script takes"
        within = _VERDICTS[found["within_limit"]]
        what, limit = "from the command to the first training step (quick start)", f"{found['limit_seconds']:g} s"
        yield what, measured, limit, within


def _dormant(found: Mapping[str, Any]) -> Iterator[_Row]:
    """The first is the stated case; the digits are the hard one."""
    if not found:
        return
    limit = f"{found['limit_percent']:g} %"
    for name, case in {found["case"]: found, "digits": found["digits"]}.items():
        step = f"{name}, {case['cpu_ms_per_step']['bare']:.0f} ms a step"
        for suffix, said in (("", "controller off"), ("_deciding", "everything on, deciding nothing")):
            what = f"CPU time over a plain PyTorch loop, {said} ({step})"
            measured = _percent(case[f"overhead_percent{suffix}"], case[f"interval{suffix}"])
            yield what, measured, limit, _VERDICTS[case[f"holds{suffix}"]]
        measured = _percent(case["noise_percent"], case["interval_noise"])
        yield f"the noise of that measure: the plain loop over itself ({step})", measured, "", ""


def _stall(found: Mapping[str, Any]) -> Iterator[_Row]:
    if not found:
        return
    flying, limits = found["in_flight"], found["limits_percent"]
    tail = flying["step_time"]["p99"]
    what = "99th percentile of step times while a kernel is compiled and fetched"
    measured, limit = _percent(tail["pooled_percent"], tail["pooled_interval"]), f"{limits['in_flight_p99']:g} %"
    yield what, measured, limit, _VERDICTS[flying["holds"]]
    waited = flying["steps_that_waited"] + (found["faults"] or {"steps_that_waited": 0})["steps_that_waited"]
    yield "training steps that waited for a compile", str(waited), "0", _VERDICTS[waited == 0]
    pause = flying["graft_pause"]["ms"]
    measured = f"{pause['median']:.0f} ms, at most {pause['greatest']:.0f} ms"
    yield "pause between two steps to graft a kernel", measured, "", ""
    for name, said in (("widening", "a widened layer"), ("branch", "a merged branch")):
        one = found["fossilized"][name]
        measured, limit = _percent(one["percent"], one["interval"]), f"{limits['fossilized']:g} %"
        yield f"step time with {said} over the same network in plain PyTorch", measured, limit, _VERDICTS[one["holds"]]


def _control_load(found: Mapping[str, Any]) -> Iterator[_Row]:
    if not found:
        return
    meanwhile = (
        f"within {found['window_seconds']:g} s while the gateways answer {found['rate_reached']:.0f} calls a second"
    )
    for name, said in (("median", "median"), ("p99", "99th percentile")):
        one, limit = found["step_time"][name], f"{found['limits'][f'{name}_percent']:g} %"
        measured = _percent(one["percent"], one["interval"])
        yield f"{said} of step times {meanwhile}", measured, limit, _VERDICTS[found["holds"][name]]


_ROWS: Final = {"startup": _startup, "dormant": _dormant, "adaptation_stall": _stall, "control_load": _control_load}


def _percent(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"
