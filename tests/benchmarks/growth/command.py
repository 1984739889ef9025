"""The commands ``python -m tests.benchmarks.growth`` and ``python -m tests.benchmarks.extend``.

``--out FILE``        make the runs that are missing (resumes; Ctrl-C and kill are safe), write the JSON
``--tune``            runs of the tuning seeds, validation figures only; prints the learning rates that they choose
``--estimate``        time some steps of each host and say how long the runs will take
``--smoke``           everything in miniature, validation figures only, nothing kept
``--write-protocol``  write this experiment into docs/benchmarks/protocol.json, and beside its runs to be what the code
                      computes; committing both fixes protocol and code and opens the test set
``--report``          write docs/benchmarks.md from the committed JSON

Without ``--tune`` and ``--smoke`` the protocol has to be committed, and to make runs the code has to compute what the
protocol was fixed with: else exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from services.chassis.files import write_atomically
from tests.benchmarks import measure
from tests.benchmarks.growth import analysis, permit, report, tuning
from tests.benchmarks.growth.arms import tuning_units, units
from tests.benchmarks.growth.protocol import PROTOCOLS, Protocol, miniature
from tests.benchmarks.growth.records import OtherCodeError, Records, best_records, open_records
from tests.benchmarks.growth.runner import WORKERS, Runner, estimate
from tests.infrastructure.processes import ROOT

_SHARED: Final = ROOT.parent / "shared" / "data"


def data_dir() -> Path:
    """``ESPER__DATA__DATA_DIR``, or where the official files lie beside a checkout."""
    return Path(os.environ.get("ESPER__DATA__DATA_DIR", _SHARED))


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--write-protocol", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--entries", nargs="*", help="only these tables")
    parser.add_argument("--arms", nargs="*", help="only these arms, and what they wait for")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these seeds")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--minutes", type=float, help="begin no run after so many; 0: any code may write the JSON")
    parser.add_argument("--commit", action="store_true", help="commit each finished run")
    return parser


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """0; 1 if runs failed; 2 if the protocol is not committed; 130 after Ctrl-C."""
    arguments = _parser(name).parse_args(argv)
    if arguments.write_protocol:
        written = permit.write(PROTOCOLS[name]), _records(PROTOCOLS[name], create=True).folder
        print(f"wrote {written[0]} and {written[1]}: once both are committed, protocol and code are fixed")
        return 0
    if arguments.report:
        print(f"wrote {report.write()}")
        return 0
    if arguments.estimate:
        _estimate(name, arguments)
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="esper-smoke-") as folder:
            return _run(name, arguments, Path(folder))
    except (permit.ProtocolNotCommittedError, OtherCodeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, the same command goes on", file=sys.stderr)
        return 130


def _estimate(name: str, arguments: argparse.Namespace) -> None:
    # Not before it is needed: it imports torch.
    from tests.benchmarks.growth import cost

    protocol, total = PROTOCOLS[name], 0.0
    if arguments.smoke:
        protocol = miniature(protocol)
    if arguments.entries:
        entries = {key: entry for key, entry in protocol.entries.items() if key in arguments.entries}
        protocol = replace(protocol, entries=entries)
    for entry, runs, seconds in cost.table(protocol, data_dir()):
        total += seconds
        print(f"{entry:18} {runs:4} runs {seconds / 3600:8.2f} h of one processor")
    hours = total / 3600 / arguments.workers
    print(f"all: {total / 3600:.1f} h, {hours:.1f} h with {arguments.workers} workers on as many free processors")


def _records(protocol: Protocol, *, tune: bool = False, create: bool = False) -> Records:
    # Not before it is needed: it imports torch.
    from tests.benchmarks.growth.canary import figures

    return open_records(protocol, figures=figures, tune=tune, create=create)


def _run(name: str, arguments: argparse.Namespace, folder: Path) -> int:
    protocol, commit = PROTOCOLS[name], permit.commit_of()
    if arguments.smoke:
        protocol = miniature(protocol)
        records = Records(folder)
    elif arguments.tune:
        records = _records(protocol, tune=True, create=True)
    else:
        commit = permit.require_committed(protocol)
        # What is only read was computed by the code it was computed by.
        records = best_records(protocol) if arguments.minutes == 0 else _records(protocol)
    planned = tuning_units(protocol) if arguments.tune else units(protocol)
    wanted = [
        unit
        for unit in planned
        if (not arguments.entries or unit.entry in arguments.entries)
        and (not arguments.arms or unit.arm in arguments.arms)
        and (not arguments.seeds or unit.seed in arguments.seeds)
    ]
    final = not (arguments.tune or arguments.smoke)
    runner = Runner(
        protocol,
        records,
        data_dir(),
        final=final,
        smoke=arguments.smoke,
        commit=arguments.commit and not arguments.smoke,
    )
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    runner.run(wanted, workers=arguments.workers, deadline=seconds)
    finished = records.finished()
    if arguments.tune:
        for line in tuning.lines(protocol, finished):
            print(line)
    else:
        result = {**analysis.result(protocol, finished, commit), "environment": measure.environment()}
        if arguments.out is not None:
            write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
        for line in analysis.lines(result):
            print(line)
    missing = [unit for unit in planned if unit.name not in finished]
    left = estimate(missing, finished)
    if missing and left is not None:
        hours = left / arguments.workers / 3600
        print(f"{len(missing)} runs are missing, about {hours:.1f} h of {arguments.workers} workers")
    return 1 if runner.failed else 0
