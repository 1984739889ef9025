"""Fields of a JSON object as a page documents them, and as a real object has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from tests.infrastructure.processes import ROOT

_NAME = re.compile(r"`([^`]+)`")


def documented(page: str, head: str) -> set[str]:
    """The fields in the first column of the table of ``page`` whose head row begins with ``| head |``.

    A name that begins with a dot is a sibling of the last one that does not: ``a[].b``, ``.c`` is ``a[].c``.
    """
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    found: set[str] = set()
    parent = ""
    for line in lines:
        if line.startswith(f"| {head} |"):
            next(lines)  # the rule below the head
            break
    for line in lines:
        if not line.startswith("|"):
            break
        for name in _NAME.findall(line.split("|")[1]):
            if not name.startswith("."):
                parent = name.rpartition(".")[0]
            found.add(parent + name if name.startswith(".") else name)
    assert found, f"{page} has no table of {head}"
    return found


def fields(value: Any, maps: Mapping[str, str], path: str = "") -> set[str]:
    """Paths of all leaves of a JSON value: ``a.b``, ``list[].c``; an empty list or null is a leaf itself.

    ``maps`` names the objects whose keys are names and no fields, with what stands for any of them:
    ``{"services": "<service>"}`` gives ``services.<service>.address``.
    """
    if isinstance(value, dict) and value:
        inner: set[str] = set()
        for key, item in value.items():
            name = maps.get(path, str(key))
            inner |= fields(item, maps, f"{path}.{name}" if path else name)
        return inner
    if isinstance(value, list) and value and any(isinstance(item, dict) for item in value):
        return set().union(*(fields(item, maps, f"{path}[]") for item in value))
    return {path}


def differences(told: set[str], found: Collection[str]) -> tuple[set[str], set[str]]:
    """Fields that are there and not ``told``, and fields that are told and not there.

    Below a null or an empty list nothing can be seen: what is told of it counts as there, if itself or all is told.
    """
    hidden = {path for path in found if any(name.startswith((f"{path}.", f"{path}[]")) for name in told)}
    unknown = {path for path in found if path not in told and path not in hidden}
    missing = {
        name
        for name in told
        if name not in found and not any(name.startswith((f"{path}.", f"{path}[]")) for path in hidden)
    }
    return unknown, missing
