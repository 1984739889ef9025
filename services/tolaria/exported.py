"""What the report says of a run's export. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.tolaria import page


def exports_table(summary: Mapping[str, Any]) -> str:
    """HTML: the files of each format, their size and how they were checked, or why there are none."""
    made = summary.get("export")
    if made is None:
        return '<p class="none">nothing was exported</p>'
    rows = []
    for name, result in made["formats"].items():
        problem = result["problem"]
        if problem is not None:
            rows.append([name, "-", "-", f"not exported: {problem}"])
            continue
        files = result["files"]
        difference = page.number(result["largest_difference"], ".1g")
        rows.append(
            [
                name,
                ", ".join(file["name"] for file in files),
                format(sum(file["bytes"] for file in files), ",d"),
                f"loaded again, outputs within {difference} of the network's",
            ]
        )
    return page.table(["format", "files", "bytes", "check"], rows, numbers=[2])
