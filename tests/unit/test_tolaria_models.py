"""Host networks, a user's own classes, trained weights, and rebuilding a grown network from its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from esper.tamiyo.v1.observation_pb2 import Observation
from services.blueprints import families
from services.chassis.config.schema import DataConfig, EsperConfig, ModelConfig
from services.chassis.errors import EsperError, Reason
from services.tolaria import controls, hosts, models, rebuild
from services.tolaria.data import splits
from services.tolaria.data.splits import DataSet, Normalization, Split
from services.tolaria.errors import ExportError, FactoryError, ModelError
from services.tolaria.export import export
from services.tolaria.factories import load_factory
from services.tolaria.ports import EventCounts, KernelTarget, KernelUnavailableError, NoDecision, OfflineMesh
from tests.support.interfaces import SPAN


def color_images() -> DataSet:
    """A few colored images with structure: each pixel is like its neighbor."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(64, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, scale_factor=2) + 0.1 * torch.randn(
        64, 3, 16, 16, generator=generator
    )
    split = Split(images, torch.arange(64) % 4)
    return DataSet(split, split, Normalization.of(images), 4, lambda: split)


def test_hosts_draw_from_a_generator_of_their_own() -> None:
    data = splits.load(DataConfig(), seed=0)
    before = torch.get_rng_state()
    one, two = (models.build_host(ModelConfig(widths=[2, 3]), data, 0) for _ in range(2))
    other = models.build_host(ModelConfig(widths=[2, 3]), data, 1)
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (one, two, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_the_stem_whitens_patches() -> None:
    data = color_images()
    model = models.build_host(ModelConfig(widths=[4, 4]), data, 0)
    assert isinstance(model, hosts.ConvolutionalHost)
    assert isinstance(model.stem, hosts.WhiteningStem)
    normalized = data.normalization(data.training.images)
    projected = torch.nn.functional.conv2d(normalized, model.stem.filters[:12], stride=2)
    flat = projected.transpose(0, 1).reshape(12, -1)
    covariance = flat @ flat.T / flat.shape[1]
    assert torch.allclose(covariance, torch.eye(12), atol=0.1)
    assert model(normalized).shape == (64, 4)
    assert not any("stem" in name for name, _ in model.named_parameters())


def test_the_mlp_takes_any_shape() -> None:
    data = splits.load(DataConfig(), seed=0)
    model = models.build_host(ModelConfig(name="mlp", widths=[5, 6]), data, 0)
    assert model(data.normalization(data.training.images[:3])).shape == (3, 10)


def test_the_resnet_and_the_transformer_give_logits() -> None:
    for data, patch in ((splits.load(DataConfig(), seed=0), 2), (color_images(), 4)):
        images = data.normalization(data.training.images[:3])
        network = models.build_host(ModelConfig(name="resnet", widths=[3, 4]), data, 0)
        assert network(images).shape == (3, data.classes)
        network = models.build_host(ModelConfig(name="vit", widths=[24, 6, 5]), data, 0)
        assert isinstance(network, hosts.VisionTransformerHost)
        assert network(images).shape == (3, data.classes)
        assert network.patches.stride == (patch, patch)
        assert network.get_submodule("blocks.1.attention.query").get_parameter("weight").shape == (24, 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="resnet", widths=[2] * 5), r"5 stages halve images of \(1, 8, 8\) to nothing"),
        (ModelConfig(name="vit", widths=[8]), "needs the width of its stream and of one hidden layer"),
    ],
)
def test_widths_that_make_no_network_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.build_host(config, splits.load(DataConfig(), seed=0), 0)


def test_images_that_are_no_whole_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of 4x4 patches"):
        hosts.build("vit", (1, 18, 16), 3, [8, 4])


def test_a_cnn_that_cannot_be_is_refused() -> None:
    data = splits.load(DataConfig(), seed=0)
    with pytest.raises(ModelError, match="halve images of"):
        models.build_host(ModelConfig(widths=[2] * 5), data, 0)
    flat = Split(torch.zeros(4, 7), torch.arange(4))
    vectors = DataSet(flat, flat, Normalization.of(flat.images), 4, lambda: flat)
    with pytest.raises(ModelError, match="a cnn takes images of shape"):
        models.build_host(ModelConfig(), vectors, 0)


MODULE = """
import torch
from torch import nn
def good(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
def number(shape, classes): return 3
def narrow(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
def breaks(shape, classes): return nn.Linear(5, 5)
class Two(nn.Module):
    def forward(self, x): return x, x
def two(shape, classes): return Two()
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_model", raising=False)


@pytest.mark.usefixtures("user_module")
def test_a_users_own_model() -> None:
    data = splits.load(DataConfig(), seed=0)
    config = ModelConfig(name="factory", factory="my_own_model:good")
    model = models.build_host(config, data, 0)
    assert model.training
    assert isinstance(model, nn.Sequential)
    # The folder is searched once: looking again does not lengthen the path.
    length = len(sys.path)
    load_factory("my_own_model:good", "model.factory")
    assert len(sys.path) == length


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "returned a int, not a torch.nn.Module"),
        ("narrow", r"puts out \(2, 2\), not \(2, 10\)"),
        ("two", r"puts out tuple, not \(2, 10\)"),
        ("breaks", r"the network failed on a batch of \(2, 1, 8, 8\): RuntimeError"),
    ],
)
def test_a_users_unusable_model_is_named(name: str, message: str) -> None:
    data = splits.load(DataConfig(), seed=0)
    with pytest.raises(FactoryError, match=message):
        models.build_host(ModelConfig(name="factory", factory=f"my_own_model:{name}"), data, 0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_trained_weights_are_loaded(tmp_path: Path, suffix: str) -> None:
    data = splits.load(DataConfig(), seed=0)
    trained = models.build_host(ModelConfig(widths=[2, 3]), data, 7)
    path = tmp_path / f"trained{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), path)
    else:
        safetensors.torch.save_file(trained.state_dict(), path)
    model = models.build_host(ModelConfig(widths=[2, 3], weights=path), data, 0)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelError, match="does not fit this host"):
        models.build_host(ModelConfig(widths=[4, 4], weights=path), data, 0)


class _Innocent:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled!')",))


def test_weights_that_are_code_or_missing_are_refused(tmp_path: Path) -> None:
    data = splits.load(DataConfig(), seed=0)
    torch.save({"a": _Innocent()}, tmp_path / "evil.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00\x01")
    for name in ("evil.pt", "torn.safetensors", "none.safetensors"):
        with pytest.raises(ModelError, match="does not fit this host"):
            models.build_host(ModelConfig(weights=tmp_path / name), data, 0)


# ---- rebuild -----------------------------------------------------------------------------------------------------


def row(path: str, before: list[int], after: list[int], **more: Any) -> dict[str, Any]:
    return {"path": path, "operation": "", "before_shape": before, "after_shape": after, **more}


class EveryLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(4, eps=1e-3)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * 64, 6)
        self.layer_norm = nn.LayerNorm(6)
        self.rms_norm = nn.RMSNorm(6, eps=1e-3)
        self.groups = nn.GroupNorm(3, 6)
        self.offset = nn.Parameter(torch.full((1, 6), 2.0))
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        images = self.norm(self.deep(self.conv(images)))
        hidden = self.groups(self.rms_norm(self.layer_norm(self.linear(self.flatten(images))))) + self.offset
        logits: Tensor = self.head(hidden)
        return logits


def test_every_kind_of_layer_grows() -> None:
    model = EveryLayer()
    model.norm.eval()
    table = [
        row("conv", [4, 1, 3, 3], [6, 1, 3, 3]),
        row("deep", [4, 1, 3, 3], [6, 1, 3, 3]),
        row("norm", [4], [6]),
        row("linear", [6, 256], [8, 384]),
        row("layer_norm", [6], [8]),
        row("rms_norm", [6], [8]),
        row("groups", [6], [8]),
        row("offset", [1, 6], [1, 8]) | {"operation": "parameter"},
        row("head", [10, 6], [10, 8]),
    ]
    rebuild.grow(model, table)
    assert model.deep.groups == 6
    assert model.norm.eps == 1e-3
    assert not model.norm.training
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert model.linear.weight.shape == (8, 384)
    assert (model.groups.num_groups, model.groups.num_channels) == (4, 8)
    assert model.rms_norm.eps == 1e-3
    # Fresh values are like those that were there: an offset of 2 in every entry.
    assert torch.equal(model.offset, torch.full((1, 8), 2.0))


def test_branches_of_every_layer_are_rebuilt() -> None:
    def spec(name: str, operation: str, inputs: int, outputs: int, kernel_size: int = 1) -> dict[str, Any]:
        return {
            "name": name,
            "operation": operation,
            "inputs": inputs,
            "outputs": outputs,
            "kernel_size": kernel_size,
            "stride": 1,
            "heads": 1,
            "bias": True,
        }

    convolutions = [
        spec("a", "conv2d", 4, 2, 3),
        spec("b", "depthwise_conv2d", 2, 2, 3),
        spec("c", "batch_norm2d", 2, 2),
        spec("d", "group_norm", 2, 2),
        spec("e", "gelu", 2, 2),
        spec("f", "conv2d", 2, 4),
    ]
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 1))
    rebuild.grow(model, [row("1", [], [4, 2, 4], layers=convolutions, spatial=True, source="input")])
    inputs = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    bridge = model[1]
    assert isinstance(bridge, rebuild.Bridge)
    hidden = model[0](inputs)
    plain = bridge.host(hidden)
    model.eval()
    out = model(inputs)
    assert torch.equal(out[:, 4:], plain[:, 4:])  # the branch writes the first four channels
    assert not torch.equal(out[:, :4], plain[:, :4])
    linear = [spec("a", "linear", 3, 2), spec("b", "layer_norm", 2, 2), spec("c", "linear", 2, 3)]
    features = rebuild.grow(
        nn.Sequential(nn.Linear(3, 3)), [row("0", [], [3, 2, 3], layers=linear, spatial=False, source="input")]
    )
    assert features(torch.zeros(4, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row("nowhere", [1], [2]), "has no layer nowhere"),
        (row("conv", [9, 9], [9, 9]), r"growth began with a weight of \(9, 9\), this network has \(4, 1, 3, 3\)"),
        (row("flatten", [9], [9]), "this network has no weight"),
        (row("nowhere.token", [1], [2]) | {"operation": "parameter"}, "has no parameter nowhere.token"),
        (row("token", [1], [2]) | {"operation": "parameter"}, "this network has no weight"),
        (row("offset", [9], [9]) | {"operation": "parameter"}, r"this network has \(1, 6\)"),
    ],
)
def test_another_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebuild.grow(EveryLayer(), [change])


def test_a_layer_that_cannot_be_widened_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="a Embedding cannot be widened"):
        rebuild.grow(model, [row("0", [3, 4], [3, 5])])


def test_safetensors_are_read_without_the_library(tmp_path: Path) -> None:
    tensors = {
        "weights": torch.randn(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"made": "here"})
    found = rebuild.read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_grown_network_is_loaded_from_its_export(tmp_path: Path) -> None:
    grown = rebuild.grow(
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), [row("0", [2, 3], [4, 3]), row("1", [3, 2], [3, 4])]
    )
    safetensors.torch.save_file(grown.state_dict(), tmp_path / "weights.safetensors")
    table = {"changes": [row("0", [2, 3], [4, 3]), row("1", [3, 2], [3, 4])]}
    (tmp_path / "growth.json").write_text(json.dumps(table))
    loaded = rebuild.load(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(torch.ones(1, 3)), grown(torch.ones(1, 3)))


def test_the_bigger_control_starts_from_a_draw_of_its_own() -> None:
    def host() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))

    table = [row("0", [2, 3], [4, 3]), row("1", [3, 2], [3, 4])]
    before = torch.get_rng_state()
    one, two = (controls.builder("bigger", host, table, 0)() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.state_dict()["0.weight"], two.state_dict()["0.weight"])
    assert controls.builder("host", host, table, 0) is host


def test_an_export_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.chassis.config.schema import GrowthConfig
    from services.kasmina.engine import GrowthEngine

    data = splits.load(DataConfig(), seed=0)
    model = models.build_host(ModelConfig(widths=[2]), data, 0)
    example = data.normalization(data.training.images[:2])
    engine = GrowthEngine(model, example, run="r", settings=GrowthConfig(), outputs=10, seed=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="was not written: Not a directory"):
        export(engine, tmp_path / "file" / "export", ModelConfig(widths=[2]), data)
    (tmp_path / "no room").mkdir()
    (tmp_path / "no room" / "weights.safetensors").symlink_to("/dev/full")
    with pytest.raises(ExportError, match="was not written: No space left on device"):
        export(engine, tmp_path / "no room", ModelConfig(widths=[2]), data)

    def full(path: Path, content: str) -> None:
        raise EsperError(f"{path}: no room on the disk", reason=Reason.STORAGE_FULL)

    with monkeypatch.context() as patched, pytest.raises(ExportError, match=r"growth\.json: no room on the disk"):
        patched.setattr("services.tolaria.export.write_atomically", full)
        export(engine, tmp_path / "full", ModelConfig(widths=[2]), data)
    files = export(engine, tmp_path / "own", ModelConfig(name="factory", factory="my:own"), data)
    assert [file.name for file in files] == ["weights.safetensors", "rebuild.py"]
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["growth.json", "rebuild.py", files[0].name]


def test_a_run_that_grew_nothing_has_a_uniform_control_that_does_not_grow() -> None:
    config = EsperConfig()
    grew = controls.config_for("uniform", config, host_flops=100, final_flops=250)
    assert (grew.growth.enabled, grew.growth.policy, grew.growth.budget.flops) == (True, "uniform", 2.5)
    assert not controls.config_for("uniform", config, host_flops=100, final_flops=100).growth.enabled


def test_without_a_mesh_nobody_answers() -> None:
    mesh = OfflineMesh()
    answer = mesh.decide(Observation(), policy="utilization", request_id="a", deadline=1.0)
    assert isinstance(answer, NoDecision)
    assert (list(mesh.candidates()), list(mesh.commands()), mesh.event_counts()) == ([], [], EventCounts())
    target = KernelTarget(families.builtin_blueprints()[0], SPAN, 1, 1)
    request = mesh.obtain_kernel(target)
    assert request.done
    with pytest.raises(KernelUnavailableError, match="there is no mesh"):
        request.result()
