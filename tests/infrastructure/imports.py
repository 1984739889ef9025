"""What a Python module imports, read from its text: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        target: full dotted name; of `from a import b` both `a` and `a.b` are reported.
        line: where it is written.
        deferred: it is inside a function, so that importing the module does not run it.
    """

    target: str
    line: int
    deferred: bool


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(source: str, *, module: str, is_package: bool) -> Iterator[Import]:
    """The imports that can ever run: all but those under `if TYPE_CHECKING`.

    Args:
        source: the module's text.
        module: its dotted name, to resolve relative imports.
        is_package: whether it is an `__init__.py`.

    Raises:
        SyntaxError: the text is not Python.
    """
    yield from _walk(ast.parse(source).body, module, is_package=is_package, deferred=False)


def _walk(nodes: list[ast.stmt], module: str, *, is_package: bool, deferred: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, deferred)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, is_package=is_package)
            yield Import(base, node.lineno, deferred)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, deferred)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _walk(node.orelse, module, is_package=is_package, deferred=deferred)
        else:
            inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, field, []), module, is_package=is_package, deferred=inside)
            for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                yield from _walk(part.body, module, is_package=is_package, deferred=inside)


def _base(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


class ImportGraph:
    """The modules under one folder and what they import."""

    def __init__(self, root: Path, folders: list[str], *, exclude: str = "services/contracts") -> None:
        """Reads every module of `folders` (or single files) below `root`.

        Raises:
            SyntaxError: a file is not Python.
        """
        self._root = root
        self.modules: dict[str, list[Import]] = {}
        for folder in folders:
            path = root / folder
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                relative = file.relative_to(root)
                if relative.as_posix().startswith(exclude):
                    continue
                is_package = file.name == "__init__.py"
                name = ".".join((relative.parent if is_package else relative.with_suffix("")).parts)
                text = file.read_text(encoding="utf-8")
                self.modules[name] = list(imports_of(text, module=name, is_package=is_package))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.modules)

    def path_to(self, start: str, package: str) -> list[str] | None:
        """The chain of imports through which importing `start` imports `package`; None when it does not.

        Importing a.b.c also runs a and a.b; deferred imports do not run.
        """
        came_from: dict[str, str | None] = {start: None}
        queue = [start]
        while queue:
            module = queue.pop(0)
            parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
            targets = [entry.target for entry in self.modules.get(module, ()) if not entry.deferred]
            for target in [*parents, *targets]:
                if within(target, package):
                    chain = [target]
                    link: str | None = module
                    while link is not None:
                        chain.append(link)
                        link = came_from[link]
                    return chain[::-1]
                if target in self._known and target not in came_from:
                    came_from[target] = module
                    queue.append(target)
        return None


def within(module: str, package: str) -> bool:
    """Whether `module` is `package` or a part of it."""
    return module == package or module.startswith(f"{package}.")
