"""The import rules of the architecture, held by reading the sources (nothing is executed)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.infrastructure.imports import ImportGraph, imports_of, within
from tests.infrastructure.processes import ROOT

COMPONENTS: Final = ("urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria")
MAY_IMPORT_TORCH: Final = ("kasmina", "tolaria", "tezzeret", "blueprints")
SHARED: Final = ("chassis", "blueprints")

# In the training process Tolaria's core calls Kasmina's core directly; its gateway stays another process's.
ALLOWED: Final = {("tolaria", "kasmina")}
GATEWAY: Final = ("servicer", "gateway", "__main__")

# Importing these must not import torch: 2 to 3 s in every process that starts with it.
TORCH_FREE: Final = (
    "train",
    "services.chassis",
    "services.urza",
    "services.oona",
    "services.tamiyo",
    *(f"services.{name}.{part}" for name in COMPONENTS for part in GATEWAY),
    *(f"services.kasmina.{part}" for part in ("lifecycle", "model", "commands", "kernel_cache")),
    *(f"services.blueprints.{part}" for part in ("spec", "vocabulary", "digest", "signature", "artifact", "families")),
)


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph(ROOT, ["services", "train.py"])


def component_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "services" and len(parts) > 1 else ""


def foreign_component_imports(graph: ImportGraph) -> list[str]:
    """Imports of a component by another one, or by what all of them share."""
    found = []
    for module, entries in graph.modules.items():
        own = component_of(module)
        if own not in (*COMPONENTS, *SHARED):
            continue
        for entry in entries:
            other = component_of(entry.target)
            if other not in COMPONENTS or other == own:
                continue
            of_gateway = any(within(entry.target, f"services.{other}.{part}") for part in GATEWAY)
            from_gateway = any(within(module, f"services.{own}.{part}") for part in GATEWAY)
            if (own, other) in ALLOWED and not of_gateway and not from_gateway:
                continue
            found.append(f"{module}:{entry.line} imports {entry.target}")
    return found


def torch_importers(graph: ImportGraph) -> list[str]:
    """Modules that import torch, now or later, outside of the components that may."""
    return [
        f"{module}:{entry.line} imports {entry.target}"
        for module, entries in graph.modules.items()
        for entry in entries
        if (within(entry.target, "torch") or within(entry.target, "torchvision"))
        and component_of(module) not in MAY_IMPORT_TORCH
    ]


def torch_at_import(graph: ImportGraph) -> list[str]:
    """Chains through which importing a torch-free module imports torch all the same."""
    chains = []
    for module in sorted(graph.modules):
        if any(within(module, package) for package in TORCH_FREE):
            chain = graph.path_to(module, "torch")
            if chain is not None:
                chains.append(" -> ".join(chain))
    return chains


def test_components_know_each_other_by_contract_only(graph: ImportGraph) -> None:
    assert foreign_component_imports(graph) == []


def test_only_the_four_that_may_import_torch(graph: ImportGraph) -> None:
    assert torch_importers(graph) == []


def test_torch_free_modules_import_no_torch(graph: ImportGraph) -> None:
    assert torch_at_import(graph) == []


def test_services_import_no_tests_and_no_clients(graph: ImportGraph) -> None:
    assert [
        f"{module}:{entry.line} imports {entry.target}"
        for module, entries in graph.modules.items()
        for entry in entries
        if within(entry.target, "tests") or within(entry.target, "esper_client") or within(entry.target, "betterproto2")
    ] == []


def test_nothing_is_unpickled(graph: ImportGraph) -> None:
    unsafe = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    found = [
        f"{module}:{entry.line} imports {entry.target}"
        for module, entries in graph.modules.items()
        for entry in entries
        if any(within(entry.target, name) for name in unsafe)
        # The official CIFAR files are pickles: one restricted reader, which builds arrays and nothing else.
        and not within(module, "services.tolaria.data")
    ]
    assert found == []


def test_blueprints_know_nothing_of_grpc(graph: ImportGraph) -> None:
    assert [
        f"{module}:{entry.line} imports {entry.target}"
        for module, entries in graph.modules.items()
        for entry in entries
        if component_of(module) == "blueprints" and within(entry.target, "grpc")
    ] == []


def write(root: Path, files: dict[str, str]) -> ImportGraph:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return ImportGraph(root, ["services"])


def test_rules_catch_a_component_that_imports_another(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {
            "services/urza/library.py": "from services.tamiyo import policy\n",
            "services/chassis/server.py": "def late():\n    import services.oona.log\n",
            "services/tolaria/trainer.py": "from services.kasmina.engine import GrowthEngine\n",
            "services/tolaria/link.py": "from services.kasmina import gateway\n",
            "services/tolaria/servicer.py": "import services.kasmina.engine\n",
        },
    )
    assert {line.split(":", maxsplit=1)[0] for line in foreign_component_imports(graph)} == {
        "services.urza.library",
        "services.chassis.server",
        "services.tolaria.link",
        "services.tolaria.servicer",
    }


def test_rules_catch_torch_where_it_may_not_be(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {
            "services/oona/log.py": "try:\n    import torch.nn\nexcept ImportError:\n    pass\n",
            "services/kasmina/engine.py": "import torch\n",
            "services/kasmina/helper.py": "from .engine import GrowthEngine\n",
            "services/kasmina/gateway.py": "from services.kasmina import helper\n",
            "services/tolaria/servicer.py": "def late():\n    import torch\n",
        },
    )
    assert torch_importers(graph) == ["services.oona.log:2 imports torch.nn"]
    assert torch_at_import(graph) == [
        "services.kasmina.gateway -> services.kasmina.helper -> services.kasmina.engine -> torch",
        "services.oona.log -> torch.nn",
    ]


def test_a_package_initializer_counts_for_its_modules(tmp_path: Path) -> None:
    graph = write(
        tmp_path,
        {"services/tolaria/__init__.py": "import torch\n", "services/tolaria/gateway.py": "import json\n"},
    )
    assert torch_at_import(graph) == ["services.tolaria.gateway -> services.tolaria -> torch"]


def test_imports_of_resolves_relative_and_skips_type_checking() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "else:\n    import json\n"
        "from . import near\nfrom ..far import thing\n"
        "match 1:\n    case 1:\n        import os\n"
    )
    targets = {entry.target for entry in imports_of(source, module="a.b.c", is_package=False)}
    assert {"json", "a.b.near", "a.far.thing", "os"} <= targets
    assert "torch" not in targets
    assert {entry.target for entry in imports_of("from . import x", module="a.b", is_package=True)} == {"a.b", "a.b.x"}
