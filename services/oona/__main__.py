"""``python -m services.oona``: the event bus as a service."""

import sys

from services.chassis.service_main import run_service
from services.oona.component import build

if __name__ == "__main__":
    sys.exit(run_service("oona", build))
