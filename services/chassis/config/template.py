"""Writes the annotated template: every key with its default, its unit and its meaning.

``python -m services.chassis.config.template > configs/experiment.yaml``; a test keeps the two equal.
"""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from services.chassis.config.loader import inline
from services.chassis.config.schema import EsperConfig, Section

_HEAD = """\
# Every key of Esper's configuration, with its default, its unit and its meaning. Runnable as it is:
#
#     python train.py --config configs/experiment.yaml
#
# Keys that are left out have these defaults. Values may also come from the environment
# (ESPER__TRAINING__EPOCHS=3) and from the command line (--set training.epochs=3), which win in this order.
# Written by services/chassis/config/template.py from the schema; change the schema, not this file.
"""


def template() -> str:
    """The template's text."""
    lines = [_HEAD]
    _section(EsperConfig(), 0, lines)
    return "\n".join(lines) + "\n"


def _section(section: Section, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    values: dict[str, Any] = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        child = getattr(section, name)
        if field.description:
            lines.extend(
                textwrap.wrap(field.description, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            )
        if isinstance(child, Section):
            lines.append(f"{indent}{name}:")
            _section(child, depth + 1, lines)
        else:
            lines.append(f"{indent}{name}: {inline(values[name])}")
        if depth == 0:
            lines.append("")


if __name__ == "__main__":
    sys.stdout.write(template())
