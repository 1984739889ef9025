"""Exports of networks that really grew: rebuilt where Esper is not, and as torch.export and ONNX programs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from services.blueprints import families
from services.kasmina.lifecycle import SeedState
from services.tolaria import export_process, models
from services.tolaria.data.splits import DataSet, Normalization, Split
from services.tolaria.errors import ExportError, TrainingFailedError
from services.tolaria.export import check_outputs, check_rebuild, export
from services.tolaria.exporting import Exports
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.progress import ProgressWriter, StatusProgress
from services.tolaria.trainer import TolariaTrainer
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, HeardProgress, Policy, config_of, grow_once

pytestmark = pytest.mark.parallel

#: Keeps whatever was measured, so that what is tested does not depend on luck with few images.
GROWTH = {
    "evaluation": {"threshold": -100.0, "min_epochs": 1},
    "isolation_steps": 3,
    "blend_steps": 3,
    "stabilization_steps": 1,
    "fine_tuning_steps": 1,
}
RESIDUAL = """
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, images):
        return (images + self.conv2(self.norm(self.conv1(images)).relu())).relu()


class Residual(nn.Module):
    def __init__(self, channels, classes, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(4) for _ in range(blocks)])
        self.head = nn.Linear(4, classes)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def network(input_shape, classes):
    return Residual(input_shape[0], classes)


def deep(input_shape, classes):
    return Residual(input_shape[0], classes, blocks=10)
"""
BARE = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import torch, rebuild
host = json.load(open(sys.argv[1] + "/growth.json"))["host"]
if host["factory"] is None:
    import model
    network = model.build(host["name"], host["input_shape"], host["classes"], host["widths"])
else:
    import residual
    network = residual.network(host["input_shape"], host["classes"])
rebuild.load(network, sys.argv[1])
check = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    assert torch.allclose(network(check["images"]), check["expected"], atol=1e-5), "the outputs differ"
assert not any(name.split(".")[0] in ("services", "esper", "safetensors") for name in sys.modules)
assert importlib.util.find_spec("services") is None, "Esper can be imported here: nothing is proven"
print("equal")
"""


def color_images() -> DataSet:
    """Images that are large enough for the whitening stem."""
    images = torch.randn(120, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(120) % 4)
    return DataSet(split, split, Normalization.of(images), 4, lambda: split)


def grown(folder: Path, policy: Policy, data: DataSet | None = None, **model: Any) -> tuple[TolariaTrainer, Harness]:
    """A trainer whose network has kept two seeds."""
    harness = Harness(folder, config_of(model=model, growth=GROWTH), policy)
    harness.data = data or harness.data
    trainer = harness.trainer()
    trainer.train()
    assert [record.state for record in trainer.engine.seeds()] == [SeedState.FOSSILIZED] * 2
    return trainer, harness


@pytest.fixture
def user_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module ``residual`` can be imported."""
    (tmp_path / "residual.py").write_text(RESIDUAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "residual", raising=False)


def rebuilt_bare(folder: Path, images: Tensor, expected: Tensor) -> str:
    """What the script prints that rebuilds the network with torch alone: isolated, in an empty folder."""
    torch.save({"images": images, "expected": expected}, folder.parent / "check.pt")
    (folder.parent / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(folder), str(folder.parent / "check.pt")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder.parent / "empty",
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "policy", "data"),
    [
        (
            {"name": "cnn", "widths": [2, 3]},
            grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv1", WIDEN, 3)),
            None,
        ),
        (
            {"name": "cnn", "widths": [3, 3, 3]},
            grow_once(("groups.1.conv2", WIDEN, 2), ("span:groups.2", BRANCH, 2)),
            None,
        ),
        ({"name": "mlp", "widths": [6, 6]}, grow_once(("hidden.0", WIDEN, 3), ("hidden.2", WIDEN, 1)), None),
        (
            {"name": "cnn", "widths": [3, 3]},
            grow_once(("groups.0.conv1", WIDEN, 2), ("span:groups.1", BRANCH, 2)),
            color_images(),
        ),
        (
            {"name": "factory", "factory": "residual:network"},
            grow_once(("blocks.0.conv1", WIDEN, 2), ("stem", WIDEN, 2)),
            None,
        ),
        (
            {"name": "resnet", "widths": [3, 4]},
            grow_once(("stem", WIDEN, 2), ("blocks.2.conv1", WIDEN, 2)),
            None,
        ),
        (
            {"name": "vit", "widths": [8, 6]},
            grow_once(("patches", WIDEN, 3), ("blocks.0.attention.query", WIDEN, 1)),
            None,
        ),
    ],
    ids=["batch-norm", "residual-branch", "mlp", "whitening-stem", "factory", "resnet", "vit"],
)
@pytest.mark.usefixtures("user_residual")
def test_a_grown_network_leaves_in_every_format(
    tmp_path: Path, model: dict[str, Any], policy: Policy, data: DataSet | None
) -> None:
    trainer, harness = grown(tmp_path, policy, data, **model)
    folder = tmp_path / "export"
    export(trainer.engine, folder, harness.config.model, harness.data)
    host = models.build_host(harness.config.model, harness.data, 7)
    assert check_rebuild(trainer.model, folder, host, harness.data) < 1e-5
    told: list[Any] = []
    export_process.write(folder, ["torch_export", "onnx"], told.append)
    assert [(each["format"], each.get("problem")) for each in told] == [("torch_export", None), ("onnx", None)]
    assert [each["files"] for each in told] == [["model.pt2"], ["model.onnx"]]
    assert told[1]["opset"] >= 18
    assert max(each["largest_difference"] for each in told) < 1e-5

    # On images, and on as many as were never traced.
    images = harness.data.normalization(harness.data.validation.images)[:13]
    with torch.no_grad():
        expected = trainer.model.eval()(images)
    program = torch.export.load(folder / "model.pt2").module()
    assert torch.allclose(program(images), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    growth = json.loads((folder / "growth.json").read_text())
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == (growth["input"]["name"], growth["input"]["shape"])
    assert (made.name, made.shape) == (growth["output"]["name"], growth["output"]["shape"])
    (found,) = session.run(None, {given.name: images.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
    if model["name"] == "factory":
        (tmp_path / "residual.py").rename(folder / "residual.py")  # its author has it
    assert rebuilt_bare(folder, images, expected) == "equal\n"

    # Nothing of this machine travels with it.
    for file in ("model.pt2", "model.onnx"):
        assert str(Path(__file__).parents[2]).encode() not in (folder / file).read_bytes()
        assert str(tmp_path).encode() not in (folder / file).read_bytes()


@pytest.mark.usefixtures("user_residual")
def test_branches_of_every_family_leave_in_every_format(tmp_path: Path) -> None:
    """One block of the network takes one family each: those that fit a residual block of four channels."""
    config = config_of(model={"name": "factory", "factory": "residual:deep"}, growth=GROWTH)
    residual = Harness(tmp_path, config)
    interface = residual.trainer().engine.interface("span:blocks.0")
    fitting = [
        blueprint
        for blueprint in families.builtin_blueprints()
        if (family := families.FAMILIES[blueprint.family]).path == "branch" and family.applies_to(interface) is None
    ]
    assert "residual_bottleneck" in {blueprint.family for blueprint in fitting}
    residual.policy = grow_once(*((f"span:blocks.{place}", each, 2) for place, each in enumerate(fitting)))
    trainer = residual.trainer()
    trainer.train()
    assert [record.state for record in trainer.engine.seeds()] == [SeedState.FOSSILIZED] * len(fitting)
    folder = tmp_path / "export"
    export(trainer.engine, folder, residual.config.model, residual.data)
    check_rebuild(trainer.model, folder, models.build_host(residual.config.model, residual.data, 7), residual.data)
    told: list[Any] = []
    export_process.write(folder, ["torch_export", "onnx"], told.append)
    assert [(each["format"], each.get("problem")) for each in told] == [("torch_export", None), ("onnx", None)]


# ---- the exporting process -------------------------------------------------------------------------------------------


def exports(folder: Path, formats: list[str], **export_section: Any) -> tuple[Exports, HeardProgress, Interrupt]:
    """The exports of a run whose network is exported already, as far as it is plain PyTorch."""
    harness = Harness(folder, config_of(export={"formats": formats, **export_section}))
    progress, interrupt = HeardProgress(), Interrupt()

    def build_host(seed: int) -> torch.nn.Module:
        return models.build_host(harness.config.model, harness.data, seed)

    made = Exports(
        harness.config, folder, harness.data, build_host, progress=ProgressWriter(progress), interrupt=interrupt
    )
    harness.interrupt = interrupt
    trainer = harness.trainer(grow=False)
    network = made.network(trainer.engine)
    assert network is not None
    (folder / "made.json").write_text(json.dumps(network))
    return made, progress, interrupt


def lines(progress: HeardProgress) -> list[str]:
    return [message.message for message in progress.heard if isinstance(message, StatusProgress)]


def test_a_child_exports_and_the_table_names_every_file(tmp_path: Path) -> None:
    made, progress, _ = exports(tmp_path, ["safetensors", "torch_export", "onnx"])
    first = json.loads((tmp_path / "made.json").read_text())
    done = made.others(first)
    folder = tmp_path / "export"
    assert list(done["formats"]) == ["safetensors", "torch_export", "onnx"]
    assert {name: result["problem"] for name, result in done["formats"].items()} == dict.fromkeys(done["formats"])
    growth = json.loads((folder / "growth.json").read_text())
    assert growth["files"].keys() == {"weights.safetensors", "rebuild.py", "model.py", "model.pt2", "model.onnx"}
    assert {path.name for path in folder.iterdir()} == {"growth.json", *growth["files"]}
    for name, told in growth["files"].items():
        content = (folder / name).read_bytes()
        assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert lines(progress)[0] == "exporting as torch_export and onnx"
    assert [line.split(",")[0] for line in lines(progress)[1:]] == ["exported model.pt2", "exported model.onnx"]
    # A resumed run makes what is missing, and that is nothing.
    before = len(progress.heard)
    assert made.others(done) == done
    assert len(progress.heard) == before


def test_a_format_without_its_packages_is_told_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    made, progress, _ = exports(tmp_path, ["safetensors", "onnx"])
    done = made.others(json.loads((tmp_path / "made.json").read_text()))
    problem = (
        "export.formats: onnx needs onnxscript, not installed here; run `pip install onnxscript`, or leave onnx out"
    )
    assert done["formats"]["onnx"]["problem"] == problem
    assert done["formats"]["safetensors"]["problem"] is None
    assert [message.state for message in progress.heard if isinstance(message, StatusProgress)] == [
        "starting",
        "finishing",
    ]
    assert lines(progress) == [problem, f"no export as onnx: {problem}"]


def test_a_deadline_an_interrupt_and_a_crash_leave_no_child_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, progress, interrupt = exports(tmp_path, ["safetensors", "torch_export"], timeout_seconds=0.3)
    first = json.loads((tmp_path / "made.json").read_text())
    problem = made.others(first)["formats"]["torch_export"]["problem"]
    assert problem == f"it was not done after 0.3 s (export.timeout_seconds); see {tmp_path}/logs/export.log"
    assert lines(progress)[-1] == f"no export as torch_export: {problem}"
    assert not (tmp_path / "export" / "model.pt2").exists()

    monkeypatch.setattr(sys, "executable", "/bin/false")
    problem = made.others(first)["formats"]["torch_export"]["problem"]
    assert problem == f"the exporting process ended with code 1; see {tmp_path}/logs/export.log"

    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    problem = made.others(first)["formats"]["torch_export"]["problem"]
    assert problem.startswith("the exporting process could not be started: No such file or directory; ")

    interrupt.request("interrupted by SIGTERM")
    monkeypatch.undo()
    with pytest.raises(TrainingInterruptedError, match="SIGTERM"):
        made.others(first)


def test_what_a_child_says_it_wrote_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, _ = exports(tmp_path, ["safetensors", "torch_export"])
    first = json.loads((tmp_path / "made.json").read_text())
    told = {"format": "torch_export", "files": ["model.pt2"], "seconds": 1.0, "largest_difference": 0.0}
    monkeypatch.setattr(made, "_child", lambda _: (json.dumps(told).encode(), "it ended"))
    problem = made.others(first)["formats"]["torch_export"]["problem"]
    assert problem == f"{tmp_path}/export/model.pt2: No such file or directory"


def test_a_run_may_want_no_export(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(export={"formats": []}))
    made = Exports(
        harness.config,
        tmp_path,
        harness.data,
        lambda _: harness.build_host(),
        progress=ProgressWriter(harness.progress),
        interrupt=harness.interrupt,
    )
    assert made.network(harness.trainer(grow=False).engine) is None
    assert not (tmp_path / "export").exists()


# ---- networks that cannot be exported --------------------------------------------------------------------------------

HOSTS = """
import torch
from torch import nn


class Hidden(nn.Linear):
    # A tensor that no state dict holds, drawn at random.
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.rand(inputs), persistent=False)

    def forward(self, images):
        return super().forward(images.flatten(1) * self.mask)


class Stubborn(nn.Linear):
    def forward(self, images):
        if torch.compiler.is_exporting():
            raise RuntimeError("not " + "very " * 100 + "exportable")
        return super().forward(images.flatten(1))


def hidden(shape, classes):
    return Hidden(64, classes)


def stubborn(shape, classes):
    return Stubborn(64, classes)


made = []


def once(shape, classes):
    made.append(0)
    if len(made) > 1:
        raise TypeError("only once")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def wandering(shape, classes):
    made.append(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), *[nn.Linear(classes, classes)] * (len(made) - 1))
"""


@pytest.fixture
def user_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_hosts.py").write_text(HOSTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_hosts", raising=False)


def plain_export(folder: Path, factory: str) -> dict[str, Any]:
    """What becomes of the safetensors export of a user's network."""
    harness = Harness(folder, config_of(model={"name": "factory", "factory": f"user_hosts:{factory}"}))
    made = Exports(
        harness.config,
        folder,
        harness.data,
        lambda seed: models.build_host(harness.config.model, harness.data, seed),
        progress=ProgressWriter(harness.progress),
        interrupt=harness.interrupt,
    )
    done = made.network(harness.trainer(grow=False).engine)
    assert done is not None
    result: dict[str, Any] = done["formats"]["safetensors"]
    return result


@pytest.mark.usefixtures("user_hosts")
@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("hidden", "is not the network that was trained: its outputs differ by"),
        ("once", "model.factory: user_hosts:once failed: TypeError: only once"),
        ("wandering", "does not rebuild the network: RuntimeError: Error"),
    ],
)
def test_a_network_that_its_weights_do_not_rebuild_is_told(tmp_path: Path, factory: str, problem: str) -> None:
    result = plain_export(tmp_path, factory)
    assert problem in result["problem"]
    assert result["files"] == ()


@pytest.mark.usefixtures("user_hosts")
def test_a_network_that_cannot_be_traced_is_told_in_one_line(tmp_path: Path) -> None:
    assert plain_export(tmp_path, "stubborn")["problem"] is None
    told: list[Any] = []
    export_process.write(tmp_path / "export", ["torch_export"], told.append)
    (problem,) = [each["problem"] for each in told]
    assert "not very very" in problem
    assert "\n" not in problem
    assert len(problem) < 400
    assert not (tmp_path / "export" / export_process.PARTIAL).exists()


def test_a_program_that_computes_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports(tmp_path, ["safetensors"])
    folder, told = tmp_path / "export", list[Any]()
    other = torch.export.export(torch.nn.Linear(8, 10), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: Dim("n")},))
    monkeypatch.setattr(torch.export, "load", lambda _: other)
    export_process.write(folder, ["torch_export"], told.append)
    assert told == [{"format": "torch_export", "problem": "it puts out (1, 1, 8, 10), not (1, 10)"}]
    assert not (folder / "model.pt2").exists()


def test_the_check_refuses_other_shapes_and_numbers() -> None:
    model = torch.nn.Identity()
    batch = torch.ones(2, 3)
    assert check_outputs(lambda inputs: inputs * (1 + 1e-5), model, [batch]) == pytest.approx(1e-5, rel=0.1)
    assert check_outputs(model, model, [batch, batch * 0]) == 0.0
    with pytest.raises(ExportError, match=r"puts out \(2, 2\), not \(2, 3\)"):
        check_outputs(lambda inputs: inputs[:, :2], model, [batch])
    with pytest.raises(ExportError, match=r"differ by 0\.001 of the largest one, 0\.0001 is allowed"):
        check_outputs(lambda inputs: inputs * 1.001, model, [batch])
    with pytest.raises(ExportError, match="differ by nan"):
        check_outputs(lambda inputs: inputs * float("nan"), model, [batch])


def test_the_tree_of_errors_keeps_exports_apart_from_failed_runs() -> None:
    assert ExportError("no").reason == "EXPORT_FAILED"
    assert not isinstance(ExportError("no"), TrainingFailedError)
