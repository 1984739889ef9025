"""Train a network that grows while it trains, on a mesh of gRPC services that this command starts.

    python train.py --config configs/quickstart.yaml

Exit codes: 0 done; 1 training failed (the reason is printed); 2 bad configuration or usage; 3 a service could not
start; 130 and 143 interrupted by Ctrl-C or SIGTERM, with a checkpoint saved (--resume goes on).
--services-only is ended by either with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


# Before the imports, which take a second: an interrupt is no stack trace. A run has its own, gentler handlers.
for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, _leave)

try:
    from services.chassis.config.errors import ConfigError
    from services.chassis.config.loader import LoadedConfig, load_config
    from services.chassis.errors import EsperError
    from services.tolaria.diagnosis_launcher import diagnose
    from services.tolaria.launcher import (
        EXIT_USAGE,
        Options,
        check_services,
        dry_run,
        refuse_changes,
        train,
    )
    from services.tolaria.run_folder import RunFolder
except ImportError as missing:
    sys.stderr.write(f"train.py: {missing}: run it as .venv/bin/python train.py ('make run' makes .venv)\n")
    sys.exit(2)

CONFIGS = Path(__file__).resolve().parent / "configs"
QUICK_STARTS = {"digits": "quickstart.yaml", "cifar10": "cifar10.yaml", "cifar100": "cifar100.yaml"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = made.add_mutually_exclusive_group()
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration; configs/experiment.yaml explains all"
    )
    source.add_argument("--quick-start", choices=sorted(QUICK_STARTS), help="a configuration that comes with Esper")
    made.add_argument("--profile", metavar="NAME", help="profiles/NAME.yaml beside the configuration, below its values")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one value, e.g. training.epochs=3"
    )
    made.add_argument("--output", metavar="DIR", help="where run folders are made (run.output_dir)")
    made.add_argument("--no-growth", action="store_true", help="train the host alone (growth.enabled=false)")
    made.add_argument("--compare", nargs="?", const="host,bigger", metavar="ARMS", help="controls: host,bigger,uniform")
    made.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with a run: its folder; default: the newest"
    )
    action = made.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="check, print the effective configuration and the plan")
    action.add_argument("--check-services", action="store_true", help="start or dial every service, print how each is")
    action.add_argument("--services-only", action="store_true", help="run the mesh without training until Ctrl-C")
    action.add_argument(
        "--diagnose", action="store_true", help="what the model is short of: train a little, look at it"
    )
    output = made.add_mutually_exclusive_group()
    output.add_argument("--verbose", action="store_true", help="plain lines, with all that happens to the mesh")
    output.add_argument("--quiet", action="store_true", help="only the result")
    made.add_argument(
        "--json", action="store_true", help="standard output is one JSON line, the result; the rest: stderr"
    )
    return made


def load(arguments: argparse.Namespace) -> LoadedConfig:
    """The effective configuration of a command line; raises ConfigError."""
    path = CONFIGS / QUICK_STARTS[arguments.quick_start] if arguments.quick_start else arguments.config
    overrides = list(arguments.set)
    if arguments.output is not None:
        overrides.append(f"run.output_dir={json.dumps(arguments.output)}")
    if arguments.no_growth:
        overrides.append("growth.enabled=false")
    if arguments.compare is not None:
        overrides.append(f"compare=[{arguments.compare}]")
    return load_config(path, profile=arguments.profile, overrides=overrides, environ=os.environ)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    usage = parser()
    arguments = usage.parse_args(argv)
    if arguments.diagnose and arguments.resume is not None:
        usage.error("argument --diagnose: not allowed with argument --resume")
    output = "verbose" if arguments.verbose else "quiet" if arguments.quiet else "normal"
    options = Options(output=output, json=arguments.json, services_only=arguments.services_only)
    try:
        loaded = load(arguments)
        if arguments.dry_run:
            return dry_run(loaded, options)
        if arguments.check_services:
            return check_services(loaded.config, options)
        stem = arguments.quick_start or (arguments.config.stem if arguments.config else "run")
        if arguments.diagnose:
            return diagnose(loaded, options, stem=stem)
        if arguments.resume is not None:
            folder = RunFolder.find(arguments.resume, loaded.config.run.output_dir.absolute())
            config = folder.config()
            refuse_changes(loaded, config)
        else:
            folder, config = RunFolder.create(loaded.config, stem=stem), loaded.config
        return train(folder, config, options, resume=arguments.resume is not None)
    except ConfigError as error:
        sys.stderr.write(f"train.py: {error}\n")
    except EsperError as error:
        sys.stderr.write(f"train.py: {error.message}\n")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
