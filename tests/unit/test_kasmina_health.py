"""Health: ranks of known spectra, too few samples is no measurement, the network is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.kasmina.health import SAMPLES_PER_CHANNEL, Probe, Reader, measure, spectrum
from tests.support.growth import Loop, PlainNet, ResidualNet, engine_for, equal, fresh, graft, images, snapshot


def normals(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(values: Tensor) -> Tensor:
    return torch.cov(values.T, correction=0)


def test_independent_channels_have_full_rank_and_copies_none_of_their_own() -> None:
    rank, participation, dead = spectrum(torch.eye(8, dtype=torch.float64))
    assert rank == pytest.approx(8.0)
    assert participation == pytest.approx(8.0)
    assert dead == 0.0
    one = normals(1000, 1)
    rank, participation, _ = spectrum(covariance(torch.cat([one, 3 * one, -one], 1)))
    assert rank == pytest.approx(1.0)
    assert participation == pytest.approx(1.0)


def test_ranks_follow_their_formulas() -> None:
    # Two pairs of identical channels and one of its own: correlation eigenvalues 2, 2, 1.
    base = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2]]
    rank, _, _ = spectrum(base @ base.T)
    shares = [0.4, 0.4, 0.2]
    assert rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    _, participation, _ = spectrum(torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)))
    assert participation == pytest.approx(36 / 18)


def test_dead_channels_are_counted_and_give_no_rank() -> None:
    rank, _, dead = spectrum(torch.diag(torch.tensor([1.0, 1.0, 1e-12, 0.0], dtype=torch.float64)))
    assert rank == pytest.approx(2.0)
    assert dead == 0.5
    assert spectrum(torch.zeros(3, 3, dtype=torch.float64)) == (None, None, 1.0)


def test_moments_of_maps_flattened_maps_and_features_agree_with_the_covariance() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.flat = nn.Linear(3 * 16, 2)
            self.tokens = nn.Linear(3, 2)

        def forward(self, maps: Tensor) -> Tensor:
            tokens = maps.flatten(2).transpose(1, 2)
            out: Tensor = self.conv(maps).mean((2, 3)) + self.flat(maps.flatten(1)) + self.tokens(tokens).mean(1)
            return out

    net = Net()
    maps = torch.randn(100, 3, 4, 4) @ torch.randn(4, 4)
    expected = spectrum(covariance(maps.double().transpose(0, 1).reshape(3, -1).T))
    for reader, factor in ((net.conv, 1), (net.flat, 16), (net.tokens, 1)):
        report = measure(
            net, torch.split(maps, 30), [Probe("a", 3, [Reader(reader, 0, 3 * factor, factor)])], flops_per_sample=10.0
        )
        [health] = report.slots
        assert health.effective_rank == pytest.approx(expected[0], rel=1e-6)
        assert health.participation_ratio == pytest.approx(expected[1], rel=1e-6)
        assert health.utilization == pytest.approx(expected[0] / 3, rel=1e-6)  # type: ignore[operator]  # measured above
        assert health.samples == report.samples == 100
        assert report.flops > 1000.0


def test_the_neediest_reader_speaks_for_the_slot() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.poor, self.rich, self.dead = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, values: Tensor) -> Tensor:
            out: Tensor = self.poor(values[:, :1].expand(-1, 2)) + self.rich(values) + self.dead(0 * values)
            return out

    net = Net()
    probe = Probe("a", 2, [Reader(layer, 0, 2, 1) for layer in (net.dead, net.poor, net.rich)])
    [health] = measure(net, [normals(100, 2).float()], [probe], flops_per_sample=1.0).slots
    assert health.effective_rank is not None
    assert health.effective_rank > 1.9
    [health] = measure(
        net, [normals(100, 2).float()], [Probe("a", 2, [Reader(net.dead, 0, 2, 1)])], flops_per_sample=1.0
    ).slots
    assert (health.effective_rank, health.dead_ratio) == (None, 1.0)
    assert health.unmeasured_reason == "no channel varies on the sample"


def test_too_few_images_or_numbers_that_are_none_are_no_measurement() -> None:
    model = fresh(PlainNet)
    engine = engine_for(model)
    assert engine.health_samples_needed() == SAMPLES_PER_CHANNEL * 6
    report = engine.measure_health([images(100)])
    measured = {health.slot: health for health in report.slots}
    assert measured["groups.0.0"].effective_rank is not None
    late = measured["groups.1.0"]
    assert late.effective_rank is late.utilization is late.participation_ratio is late.dead_ratio is None
    assert late.unmeasured_reason == "100 images are too few for 6 channels, which need 120"
    broken = engine.measure_health([torch.full((200, 1, 8, 8), float("nan"))])
    assert {health.effective_rank for health in broken.slots} == {None}
    assert "not finite" in broken.slots[0].unmeasured_reason
    assert engine.measure_health([]).samples == 0


def test_measuring_leaves_no_trace_in_the_network_or_the_random_streams() -> None:
    model = fresh(ResidualNet)
    engine = engine_for(model)
    loop = Loop(model, engine)
    loop.sync(graft(engine, "stem", 2))
    loop.train(2)
    bits, stream = snapshot(model), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    report = engine.measure_health([images(60), images(60, 5)])
    assert equal(bits, snapshot(model))
    assert torch.equal(stream, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert report.slots[0].width == 6
    assert report.flops >= engine.flops() * 120


def test_gradient_norms_are_those_of_the_last_backward_pass_or_none() -> None:
    model = fresh(PlainNet)
    engine = engine_for(model)
    first = engine.measure_health([images(4)]).slots[0]
    assert first.gradient_norm is None
    graft(engine, "groups.0.0", 2)
    torch.autograd.backward(F.cross_entropy(model(images(4)), torch.zeros(4, dtype=torch.long)))
    found = engine.measure_health([images(4)]).slots[0].gradient_norm
    layer = model.get_submodule("groups.0.0")
    gradients = [layer.get_parameter(name).grad for name in ("host.weight", "cells.weight:s1:host")]
    assert found == pytest.approx(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
    assert engine.measure_health([images(4)], gradient_norms=False).slots[0].gradient_norm is None


def test_hooks_are_gone_after_a_forward_that_fails() -> None:
    model = fresh(PlainNet)
    engine = engine_for(model)
    with pytest.raises(RuntimeError):
        engine.measure_health([torch.zeros(2, 7, 8, 8)])
    assert not any(module._forward_pre_hooks for module in model.modules())
