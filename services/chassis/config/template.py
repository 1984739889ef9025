"""Writes the annotated template: every key with its default, its unit and its meaning.

``python -m services.chassis.config.template > configs/experiment.yaml``; a test keeps the two equal.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any, Literal, get_args, get_origin

from services.chassis.config.document import inline
from services.chassis.config.schema import EsperConfig, Section

_HEAD = """\
# Every key of Esper's configuration, with its default, its unit and its meaning. Runnable as it is:
#
#     python train.py --config configs/experiment.yaml
#
# Keys that are left out have these defaults. Values may also come from the environment
# (ESPER__TRAINING__EPOCHS=3) and from the command line (--set training.epochs=3); the later wins.
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
        about = inspect.getdoc(type(child)) if isinstance(child, Section) else field.description
        words = " ".join(filter(None, [about, _choices(field.annotation)]))
        lines.extend(textwrap.wrap(words, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "))
        if isinstance(child, Section):
            lines.append(f"{indent}{name}:")
            _section(child, depth + 1, lines)
        else:
            lines.append(f"{indent}{name}: {inline(values[name])}")
        if depth == 0:
            lines.append("")


def _choices(annotation: Any) -> str | None:
    """The values that a key may have where they are few, also where it is a list of them."""
    if get_origin(annotation) is Literal:
        return f"One of {', '.join(get_args(annotation))}."
    if get_origin(annotation) is list and (inner := _choices(get_args(annotation)[0])):
        return inner.replace("One of", "Any of")
    return None


if __name__ == "__main__":
    sys.stdout.write(template())
