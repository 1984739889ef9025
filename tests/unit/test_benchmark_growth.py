"""The proof's harness is honest: paired, repeatable, blind to the test set, and it notices who cheats."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.tolaria.data.splits import DataSet, Split
from tests.benchmarks.growth import analysis, command, hosts, permit, report, training, tuning, upkeep
from tests.benchmarks.growth.analysis import DishonestRunsError
from tests.benchmarks.growth.arms import ARMS, Unit, needs, ready, tuning_units, units
from tests.benchmarks.growth.canary import easy_images
from tests.benchmarks.growth.protocol import (
    EXTEND,
    FIXED_RULES,
    GROWTH,
    PROTOCOLS,
    SIX,
    Contrast,
    Entry,
    Growth,
    Network,
    Protocol,
    Recipe,
    Tuning,
    miniature,
)
from tests.benchmarks.growth.records import (
    RUNS,
    OtherCodeError,
    Records,
    best_records,
    code_hash,
    open_records,
    same_figures,
)
from tests.benchmarks.growth.services import LocalServices
from tests.infrastructure.processes import ROOT

ENTRY = Entry(
    network=Network(widths=(2, 2, 3, 3, 4, 4)),
    arms=("host", "tamiyo", "final_equal_flops", "off", "sweep", "transplant"),
    seeds=(10, 11),
    recipe=Recipe(batch_size=30, epochs=3),
    growth=Growth(target_widths=(4, 4, 6, 6, 8, 8), window=(0.3, 0.6), decisions=2, health_samples=300),
    sweep=((3, 3, 4, 4, 5, 5), (4, 4, 6, 6, 8, 8)),
)
TINY = Protocol(
    name="growth",
    entries={"balanced": ENTRY},
    contrasts=(Contrast(name="over host", first="tamiyo", second=("host",), entries=("balanced",), primary=True),),
)
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data() -> DataSet:
    return easy_images()


@pytest.fixture(scope="module")
def make(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a run of one arm, once; ``again=True`` makes it anew."""
    done: dict[str, dict[str, Any]] = {}

    def run(arm: str, seed: int = 10, *, again: bool = False, **options: Any) -> dict[str, Any]:
        unit = Unit("balanced", arm, seed)
        if unit.name not in done or again:
            given = {role: run(need.arm, need.seed) for role, need in needs(TINY, unit).items()}
            folder = tmp_path_factory.mktemp(unit.name)
            order = training.Order(entry=ENTRY, unit=unit, given=given, folder=folder)
            record = training.run(order, data, LocalServices(folder), **options)
            if again:
                return record
            done[unit.name] = record
        return done[unit.name]

    return run


@pytest.fixture
def runs(make: Make) -> dict[str, dict[str, Any]]:
    """Honest runs of one seed, to be tampered with."""
    return {f"balanced.{arm}.10": copy.deepcopy(make(arm)) for arm in ENTRY.arms if arm != "transplant"}


def test_all_arms_of_a_seed_train_on_the_same_batches(runs: dict[str, dict[str, Any]], make: Make) -> None:
    longest = max((run["batches"] for run in runs.values()), key=len)
    assert len(set(longest)) == len(longest) >= 3
    assert all(run["batches"] == longest[: len(run["batches"])] for run in runs.values())
    assert make("host", 11)["batches"] != runs["balanced.host.10"]["batches"]
    analysis.check(TINY, runs)


@pytest.mark.parametrize("arm", ["host", "tamiyo"])
def test_the_same_run_twice_is_bit_identical(arm: str, make: Make) -> None:
    one, two = make(arm), make(arm, again=True)
    timed = {"cpu_seconds", "growth_cpu_seconds", "wall_seconds", "latency_ms"}
    assert {key: one[key] for key in one.keys() - timed} == {key: two[key] for key in two.keys() - timed}


def test_the_platform_with_its_controller_off_changes_nothing(make: Make) -> None:
    assert make("off")["weights"] == make("host")["weights"]
    assert make("off")["growth_flops"] > 0, "it looked at the layers, and that is billed"


def test_what_a_grown_run_grew_is_known(make: Make) -> None:
    run = make("tamiyo")
    assert any(run["plans"])
    assert {seed["outcome"] for seed in run["seeds"]} == {"FOSSILIZED"}, "judged, and nothing culled"
    assert any(seed["contribution"] is not None for seed in run["seeds"])
    assert [seen["epoch"] for seen in run["utilization"]] == [1, 2]
    assert all(0 < share <= 1 for seen in run["utilization"] for name, share in seen.items() if name != "epoch")
    assert run["decision_epochs"] == [1, 2]
    assert make("transplant")["plans"] == make("tamiyo", 11)["plans"]


def test_a_lineage_replayed_without_the_rule_is_the_same_network(make: Make, data: DataSet, tmp_path: Path) -> None:
    grown = make("tamiyo")
    order = training.Order(
        entry=ENTRY, unit=Unit("balanced", "transplant", 10), given={"donor": grown}, folder=tmp_path
    )
    replayed = training.run(order, data, LocalServices(tmp_path))
    assert replayed["plans"] == grown["plans"]
    assert replayed["weights"] == grown["weights"]


def test_equal_flops_are_equal(runs: dict[str, dict[str, Any]]) -> None:
    grown, equal = runs["balanced.tamiyo.10"], runs["balanced.final_equal_flops.10"]
    spent = grown["training_flops"] + grown["growth_flops"]
    assert equal["training_flops"] == pytest.approx(spent, rel=1 / equal["steps"])
    assert equal["widths"] == grown["widths"]
    equal["training_flops"] *= 1.5
    with pytest.raises(DishonestRunsError, match=r"final_equal_flops spent 1\.\d+ of the FLOPs of tamiyo"):
        analysis.check(TINY, runs)


def test_rules_that_spent_more_than_others_are_caught(runs: dict[str, dict[str, Any]]) -> None:
    runs["balanced.uniform.10"] = {**copy.deepcopy(runs["balanced.tamiyo.10"]), "arm": "uniform"}
    runs["balanced.uniform.10"]["growth_flops"] = 0
    analysis.check(TINY, runs)
    runs["balanced.uniform.10"]["training_flops"] *= 1.5
    with pytest.raises(
        DishonestRunsError, match=r"uniform spent 1\.500 of the training FLOPs of tamiyo, allowed are 3%"
    ):
        analysis.check(TINY, runs)
    # Under a budget of parameters rules differ in FLOPs.
    record = replace(TINY, entries={"balanced": replace(ENTRY, growth=Growth(target_parameters=900))})
    analysis.check(record, runs)
    runs["balanced.uniform.10"]["parameters"] *= 2
    with pytest.raises(DishonestRunsError, match=r"uniform spent 2\.000 of the parameters of tamiyo"):
        analysis.check(record, runs)


def test_an_arm_with_another_arms_data_order_is_caught(runs: dict[str, dict[str, Any]], make: Make) -> None:
    runs["balanced.tamiyo.10"]["batches"] = make("tamiyo", 11)["batches"]
    with pytest.raises(DishonestRunsError, match="trained on other batches"):
        analysis.result(TINY, runs, None)


def test_a_sweep_that_was_chosen_by_the_test_set_is_caught(runs: dict[str, dict[str, Any]]) -> None:
    sweep = runs["balanced.sweep.10"]
    accuracies = [shape["validation_accuracy"] for shape in sweep["sweep"]]
    assert sweep["validation_accuracy"] == max(accuracies)
    sweep["validation_accuracy"] -= 1
    with pytest.raises(DishonestRunsError, match="is not the one it chose"):
        analysis.check(TINY, runs)
    sweep["chosen"] = 1 - sweep["chosen"]
    sweep["sweep"][sweep["chosen"]]["validation_accuracy"] = min(accuracies) - 1
    with pytest.raises(DishonestRunsError, match="which validation does not say"):
        analysis.check(TINY, runs)


def test_a_platform_that_changes_the_host_is_caught(runs: dict[str, dict[str, Any]]) -> None:
    runs["balanced.off.10"]["weights"] = "0" * 64
    with pytest.raises(DishonestRunsError, match="controller off changed the host"):
        analysis.check(TINY, runs)


def test_the_test_set_is_read_once_and_only_by_final_runs(data: DataSet, make: Make) -> None:
    asked = []

    def read() -> Split:
        asked.append(1)
        return data.read_test()

    final = make("host", again=True, read_test=read)
    assert len(asked) == 1
    assert 0 <= final["test_accuracy"] <= 100
    assert final["weights"] == make("host")["weights"]
    assert make("host")["test_accuracy"] is None


def test_no_test_set_before_the_protocol_is_committed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    with pytest.raises(permit.ProtocolNotCommittedError, match="is not committed"):
        permit.require_committed(GROWTH, tmp_path)
    path = permit.write(GROWTH, tmp_path)
    with pytest.raises(permit.ProtocolNotCommittedError, match="is not committed"):
        permit.require_committed(GROWTH, tmp_path)
    git("add", "-A")
    git("commit", "-qm", "fixed")
    commit = permit.require_committed(GROWTH, tmp_path)
    assert len(commit) == 40
    assert permit.commit_of(tmp_path) == commit
    changed = replace(GROWTH, confidence=0.9)
    with pytest.raises(permit.ProtocolNotCommittedError, match="as committed is not the protocol growth as it is now"):
        permit.require_committed(changed, tmp_path)
    # A hash alone does not open it: the text must be the protocol's too.
    forged = json.loads(path.read_text())
    forged["growth"]["confidence"] = 0.5
    for text in (json.dumps(forged), "no json"):
        path.write_text(text)
        git("commit", "-qam", "forged")
        with pytest.raises(permit.ProtocolNotCommittedError):
            permit.require_committed(GROWTH, tmp_path)


def test_probes_widen_one_layer_each_at_equal_cost(data: DataSet) -> None:
    host = hosts.forward_flops(ENTRY, ENTRY.network.widths, data)
    for layer, own in enumerate(ENTRY.network.widths):
        widths = training.probed(ENTRY, layer, 2.0, data)
        assert widths[layer] > own
        assert widths[:layer] + widths[layer + 1 :] == ENTRY.network.widths[:layer] + ENTRY.network.widths[layer + 1 :]
        one_more = (*widths[:layer], widths[layer] + 1, *widths[layer + 1 :])
        assert hosts.forward_flops(ENTRY, widths, data) <= 2 * host < hosts.forward_flops(ENTRY, one_more, data)
    assert {unit.arm for unit in tuning_units(GROWTH)} >= {f"probe_{layer}" for layer in range(8)}
    assert not any(unit.arm.startswith("probe") for unit in units(GROWTH))


def test_a_miniature_has_images_enough_to_measure_its_host() -> None:
    for protocol in PROTOCOLS.values():
        for name, entry in miniature(protocol).entries.items():
            assert entry.recipe.limit is not None
            training_images = entry.recipe.limit * (1 - entry.recipe.validation_ratio)
            assert training_images >= 20 * max(entry.network.widths), f"{name}: Tamiyo would plan nothing"


@pytest.mark.parametrize("name", ["narrow_not_needy", "wide_but_needy", "mlp"])
def test_every_kind_of_host_is_built_with_its_widths(name: str, data: DataSet) -> None:
    entry = GROWTH.entries[name]
    before = torch.get_rng_state()
    model = hosts.build(entry, entry.network.widths, data, 0)
    assert torch.equal(torch.get_rng_state(), before), "its draw is its own"
    assert hosts.widths_of(model) == entry.network.widths
    assert model(data.normalization(data.training.images[:2])).shape == (2, data.classes)
    assert entry.growth.target_widths is not None
    growth = hosts.forward_flops(entry, entry.growth.target_widths, data) / hosts.forward_flops(
        entry, entry.network.widths, data
    )
    assert 2.0 < growth < 4.5
    assert hosts.parameters(entry, entry.network.widths, data) == sum(p.numel() for p in model.parameters())


def test_every_entry_can_be_run_and_every_contrast_is_about_arms_it_has() -> None:
    assert set(SIX) <= GROWTH.entries.keys()
    for protocol in PROTOCOLS.values():
        for name, entry in protocol.entries.items():
            assert set(entry.arms) <= ARMS.keys() & report.IN_WORDS.keys()
            assert not set(entry.seeds) & set(protocol.tuning_seeds)
            assert entry.network.why, name
        for contrast in protocol.contrasts:
            for name in contrast.entries:
                assert {contrast.first, *contrast.second} <= set(protocol.entries[name].arms)
    assert sum(contrast.primary for contrast in GROWTH.contrasts) == 2
    assert len(GROWTH.entries["balanced"].seeds) == 12
    assert len(GROWTH.entries["balanced"].sweep) == 4
    assert GROWTH.hash != EXTEND.hash


def test_units_wait_for_what_they_need_and_for_nothing_else() -> None:
    for protocol in PROTOCOLS.values():
        for tune, planned in ((False, units(protocol)), (True, tuning_units(protocol))):
            waiting = list(dict.fromkeys([*planned, *(n for unit in planned for n in needs(protocol, unit).values())]))
            done: dict[str, dict[str, Any]] = {}
            assert len({unit.name for unit in waiting}) == len(waiting)
            assert all((unit.seed in protocol.tuning_seeds) == tune for unit in waiting)
            assert all((unit.rate is not None) == tune for unit in waiting), "a tuning run's name says its rate"
            while waiting:
                now = list(ready(protocol, waiting, done))
                assert now, f"these wait for each other: {waiting}"
                done |= {unit.name: {} for unit in now}
                waiting = [unit for unit in waiting if unit not in now]
    donor = needs(GROWTH, Unit("balanced", "transplant", 21))["donor"]
    assert donor.seed == 10, "the last seed takes the first one's plan"


def test_a_run_that_is_cut_short_has_whole_seeds_of_what_matters_most() -> None:
    order = units(EXTEND)
    assert {unit.entry for unit in order} == EXTEND.entries.keys()
    first = [unit for unit in order if unit.entry != "20"]
    assert order[: len(first)] == first, "20 epochs come last"
    of_a_seed = len(first) // 6
    for index in range(6):
        assert {unit.seed for unit in first[index * of_a_seed : (index + 1) * of_a_seed]} == {10 + index}
    leading = ["tamiyo", "host", "host_equal_flops", "final_equal_flops", "uniform"]
    arms = [unit.arm for unit in units(GROWTH)]
    assert arms[: 12 * len(leading)] == 12 * leading, "what growth is worth at all comes first"
    assert {unit.entry for unit in units(GROWTH)[60 : 60 + 6 * (3 + 5 * 6)]} == set(SIX), "then which rule is best"
    for protocol in PROTOCOLS.values():
        assert len(set(units(protocol))) == sum(len(one.arms) * len(one.seeds) for one in protocol.entries.values())


def test_tuning_chooses_by_the_mean_on_validation_when_all_of_it_is_there() -> None:
    one = Tuning(entries=("balanced",), arms=("tamiyo", "uniform"), rates=(0.2, 0.4), seeds=(0, 1))
    protocol = replace(TINY, tuning=(one,))
    worth = {0.2: {"tamiyo": 80.0, "uniform": 78.0}, 0.4: {"tamiyo": 79.5, "uniform": 79.5}}
    finished = {
        unit.name: {"validation_accuracy": worth[unit.rate or 0][unit.arm] + unit.seed}
        for unit in tuning_units(protocol)
    }
    assert tuning.chosen(protocol, finished) == {"balanced": {"grown": 0.4}}
    assert any("rate 0.4   validation 80.00 ± 0.58 (4 runs)" in line for line in tuning.lines(protocol, finished))
    del finished["balanced.tamiyo.0.rate-0.2"]
    assert tuning.chosen(protocol, finished) == {}
    assert replace(protocol, tuning=()).tuning_hash == protocol.tuning_hash
    longer = replace(protocol, entries={"balanced": replace(ENTRY, recipe=replace(ENTRY.recipe, epochs=4))})
    assert longer.tuning_hash != protocol.tuning_hash


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_rates_of_the_protocol_are_those_that_the_committed_tuning_runs_chose(name: str) -> None:
    protocol = PROTOCOLS[name]
    for folder in (RUNS / name / f"tuning-{protocol.tuning_hash[:12]}").glob("*/"):
        for entry, rates in tuning.chosen(protocol, Records(folder).finished()).items():
            assert protocol.entries[entry].rates.items() >= rates.items()


@pytest.mark.parametrize("host", GROWTH.probed)
def test_a_host_whose_width_is_said_to_mislead_was_probed(host: str) -> None:
    (folder,) = (RUNS / "growth" / f"tuning-{GROWTH.tuning_hash[:12]}").glob("*/")
    finished = Records(folder).finished()
    (narrow,), (wide,) = (tuning.probe_gains(GROWTH, finished, host, f"probe_{layer}") for layer in (0, 2))
    assert narrow + 0.5 < wide, "as many FLOPs are worth more in a layer of the chain than in the narrow one beside it"


def test_code_that_computes_the_same_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    root, runs_folder = tmp_path / "repository", tmp_path / "runs"
    file = root / "services" / "kasmina" / "engine.py"
    file.parent.mkdir(parents=True)
    figures = {"host": {"losses": [2.0, 1.0], "widths": [1], "batches": "a"}}
    asked = []

    def opened(change: str, losses: list[float], **options: Any) -> Records:
        file.write_text(change)

        def now() -> dict[str, dict[str, Any]]:
            asked.append(change)
            return {"host": {**figures["host"], "losses": losses}}

        return open_records(TINY, figures=now, runs=runs_folder, root=root, **options)

    first = opened("one", [2.0, 1.0])
    assert opened("one", [0.0]).folder == first.folder
    assert asked == ["one"], "known code is not run again"
    assert opened("refactored", [2.0, 1.009]).folder == first.folder, "rounding grows from epoch to epoch"
    assert opened("refactored", [0.0]).folder == first.folder
    with pytest.raises(OtherCodeError, match="computes something else than the code that the protocol"):
        opened("another rule", [2.0, 1.1], create=False)
    with pytest.raises(OtherCodeError):
        opened("another draw", [2.01, 1.0], create=False)
    assert opened("another rule", [2.0, 1.1]).folder != first.folder
    assert opened("refactored", [0.0], create=False).folder == first.folder
    assert opened("one", [0.0], tune=True).folder != first.folder
    first.keep("balanced.host.10", {"seed": 10})
    assert first.finished() == {"balanced.host.10": {"seed": 10}}
    assert best_records(TINY, runs=runs_folder).folder == first.folder, "of those that with a finished run"
    first.path("balanced.host.11").write_text("{")
    with pytest.raises(ValueError, match="damaged: delete it"):
        first.finished()
    with pytest.raises(OtherCodeError, match="no run of the protocol"):
        best_records(replace(TINY, confidence=0.9), runs=runs_folder)
    assert not same_figures(figures, {})
    assert same_figures(figures, {**figures, "mlp/host": figures["host"]}), "later code knows more of them"
    assert not same_figures({**figures, "mlp/host": figures["host"]}, figures)
    assert not same_figures(figures, {"host": {**figures["host"], "batches": "b"}})
    assert len(code_hash(ROOT)) == 64


# ---- figures -----------------------------------------------------------------------------------------------------


def table(**arms: list[float | None]) -> dict[str, Any]:
    made = {}
    for name, test in arms.items():
        seeds = list(range(10, 10 + len(test)))
        figures: dict[str, list[float]] = {key: [1.0] * len(seeds) for key in analysis.FIGURES}
        made[name] = {"seed": seeds, **figures, "test_accuracy": test}
    return {"arms": made}


def test_intervals_are_students() -> None:
    found = analysis.compare([[1.0, 2.0, 3.0]], margin=None, confidence=0.95)
    # mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.3027
    assert found["interval"] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-3)
    assert found["p"] == pytest.approx(0.0742, abs=1e-3)
    assert found["holds"] is False
    assert analysis.compare([[1.0]], margin=None, confidence=0.95)["interval"] is None
    assert analysis.compare([[1.0, 1.0]], margin=None, confidence=0.95)["holds"] is None


def test_not_worse_is_a_test_with_its_margin() -> None:
    nearly = [-0.1, 0.0, -0.2, 0.1, -0.05, 0.0]
    assert analysis.compare([nearly], margin=0.3, confidence=0.95)["holds"] is True
    assert analysis.compare([nearly], margin=None, confidence=0.95)["holds"] is False
    # No significant difference is no proof of equality.
    assert analysis.compare([[-2.0, 2.0, -1.0, 1.0]], margin=0.3, confidence=0.95)["holds"] is False


def test_entries_count_alike_whatever_their_seeds() -> None:
    found = analysis.compare([[1.0, 1.2], [3.0, 3.1, 2.9, 3.0]], margin=None, confidence=0.95)
    assert found["mean"] == pytest.approx((1.1 + 3.0) / 2)


def test_the_best_of_several_is_what_counts() -> None:
    protocol = replace(
        TINY,
        contrasts=(Contrast(name="best", first="tamiyo", second=("uniform", "random"), entries=("balanced",)),),
    )
    tables = {"balanced": table(tamiyo=[80.0, 81.0, 82.1], uniform=[80.0, 81.1, 82.0], random=[70.0, 71.0, 72.0])}
    (found,) = analysis.contrasts(protocol, tables)
    assert found["mean"] == pytest.approx(0.0, abs=1e-9)
    assert found["holds"] is False
    uniform, chance = found["against"]["uniform"], found["against"]["random"]
    assert found["interval"] == uniform["interval"], "the nearest rule's, where the others are far away"
    lines = analysis.lines({"hosts": {}, "contrasts": [found]})
    assert lines[1:] == [
        f"    against {arm}: {analysis.difference(one)}" for arm, one in (("uniform", uniform), ("random", chance))
    ]
    # An arm of wide spread may be the best in truth, though it is not on these seeds.
    wide = {"balanced": table(tamiyo=[80.0, 81.0, 82.1], uniform=[79.9, 81.0, 82.1], random=[78.0, 83.0, 81.0])}
    (unsure,) = analysis.contrasts(protocol, wide)
    assert unsure["mean"] == pytest.approx(0.0333, abs=1e-3)
    assert unsure["interval"][0] == unsure["against"]["random"]["interval"][0] < -1
    assert unsure["interval"][1] == unsure["against"]["uniform"]["interval"][1] < 1
    (unknown,) = analysis.contrasts(protocol, {"balanced": table(tamiyo=[1.0], uniform=[None], random=[1.0])})
    assert unknown["mean"] is None
    assert analysis.verdict(unknown) == "not measured"


def test_there_is_no_verdict_before_all_pairs_are_there() -> None:
    (one,) = analysis.contrasts(TINY, {"balanced": table(tamiyo=[80.0, 81.1], host=[70.0, 71.0])})
    assert one["holds"] is True
    many = replace(TINY, entries={"balanced": replace(ENTRY, seeds=(10, 11, 12))})
    (one,) = analysis.contrasts(many, {"balanced": table(tamiyo=[80.0, 81.1], host=[70.0, 71.0])})
    assert one["holds"] is None
    assert analysis.verdict(one).endswith("no verdict: 1 pairs are missing")


def test_primary_contrasts_are_corrected_where_there_are_more_than_two() -> None:
    tables = {"balanced": table(tamiyo=[80.0, 81.1], host=[70.0, 71.0])}
    two, three = (analysis.contrasts(replace(TINY, contrasts=TINY.contrasts * count), tables)[0] for count in (2, 3))
    assert two["p_corrected"] is None
    assert three["p_corrected"] == pytest.approx(3 * two["p"])


def test_holm() -> None:
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_json_has_its_form(runs: dict[str, dict[str, Any]]) -> None:
    made = json.loads(json.dumps(analysis.result(TINY, runs, "c0ffee")))
    assert made["protocol"]["hash"] == TINY.hash
    assert made["protocol"]["commit"] == "c0ffee"
    host = made["hosts"]["balanced"]["arms"]["host"]
    assert {key: len(values) for key, values in host.items()} == dict.fromkeys(host, 1)
    assert set(analysis.FIGURES) | {"seed", "widths"} == set(host)
    assert host["test_accuracy"] == [None]
    assert "transplant" not in made["hosts"]["balanced"]["arms"], "what was not run is absent"
    assert any("over host: not measured" in line for line in analysis.lines(made))
    extended = analysis.result(EXTEND, {}, None)
    assert set(extended["budgets"]) == {"4", "10", "20"}


def test_the_cost_is_told_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main("growth", ["--smoke", "--estimate", "--entries", "digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["digits", "12", "runs"]
    assert "with 2 workers" in lines[-1]


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_page_of_the_repository_is_what_its_json_says() -> None:
    text, drawings = report.pages(ROOT)
    assert (ROOT / report.PAGE).read_text(encoding="utf-8") == text, "run python -m tests.benchmarks.growth --report"
    for name, drawing in drawings.items():
        assert (ROOT / report.FOLDER / name).read_text(encoding="utf-8") == drawing


def test_the_page_says_what_is_within_its_limit_and_what_is_not_known(tmp_path: Path) -> None:
    assert upkeep.section(tmp_path) is None
    steps = {name: {"percent": 1.5, "interval": [low, 4.0]} for name, low in (("median", 0.5), ("p99", -1.0))}
    made = {
        "window_seconds": 0.5,
        "rate_reached": 199.6,
        "limits": {"median_percent": 2.0, "p99_percent": 10.0},
        "step_time": steps,
        "holds": {"median": None, "p99": True},
    }
    (tmp_path / "control_load.json").write_text(json.dumps(made))
    rows = [line for line in (upkeep.section(tmp_path) or "").splitlines() if line.startswith("|")][2:]
    meanwhile = "of step times within 0.5 s while the gateways answer 200 calls a second"
    assert rows == [
        f"| median {meanwhile} | +1.50 % [+0.50, +4.00] | 2 % | not shown |",
        f"| 99th percentile {meanwhile} | +1.50 % [-1.00, +4.00] | 10 % | yes |",
    ]


def test_what_the_readme_and_the_guide_quote_is_what_the_json_says() -> None:
    for name in report.QUOTING:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "| extra budget, in epochs of the bigger network | grown |" in text
        assert report.quoting(text) == text, "run python -m tests.benchmarks.growth --report"
        assert report.quoting(text.replace("| 4 | ", "| 4 | 9")) == text, "what is between the marks is replaced"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| the host, not grown | " in readme
    changed = readme.replace("| the host, not grown | ", "| the host, not grown | 9")
    assert report.quoting(changed) == readme, "that of growth, too"
    assert report.quoting("no marks") == "no marks"


def test_a_table_quoted_in_short_leaves_out_arms_that_lack_seeds(tmp_path: Path) -> None:
    arms = table(tamiyo=[82.0, 83.0], host=[75.0, 76.5], random=[81.0])
    content = {**GROWTH.content(), "entries": {"balanced": {"arms": ["host", "tamiyo", "random"], "seeds": [10, 11]}}}
    made = {"protocol": content, "hosts": {"balanced": arms}, "contrasts": []}
    (tmp_path / report.FOLDER).mkdir(parents=True)
    (tmp_path / report.FOLDER / "growth.json").write_text(json.dumps(made))
    mark = "<!-- from docs/benchmarks/growth.json, by python -m tests.benchmarks.growth --report -->"
    quoted = report.quoting(f"before\n{mark}\nold\n<!-- end -->\nafter", tmp_path)
    assert "| the host, not grown | 75.8 | " in quoted
    assert "| +6.75 [+3.57, +9.93] |" in quoted
    assert "by chance" not in quoted
    assert "old" not in quoted
    assert quoted.startswith("before\n")
    assert quoted.endswith("<!-- end -->\nafter")


def test_rules_quoted_in_short_are_of_whole_hosts(tmp_path: Path) -> None:
    rules: dict[str, list[float | None]] = {rule: [80.0, 80.5 + place] for place, rule in enumerate(FIXED_RULES)}
    whole = table(tamiyo=[82.0, 83.0], **rules)
    entries = {host: {"seeds": [10, 11]} for host in SIX}
    made = {"protocol": {**GROWTH.content(), "entries": entries}, "hosts": dict.fromkeys(SIX, whole)}
    (tmp_path / report.FOLDER).mkdir(parents=True)
    file = tmp_path / report.FOLDER / "growth.json"
    file.write_text(json.dumps(made))
    mark = "<!-- from rules of docs/benchmarks/growth.json, by python -m tests.benchmarks.growth --report -->"
    rows = report.quoting(f"{mark}\n<!-- end -->", tmp_path).splitlines()[3:-1]
    assert [row.split(" | ")[0] for row in rows] == [*(f"| `{host}`" for host in SIX), "| **mean of the six**"]
    assert rows[0].startswith("| `balanced` | 82.5 | +2.25 [-0.93, +5.43] | +1.75 [")
    assert "| +2.25 [+2.00, +2.50] |" in rows[-1], "six hosts have a narrower interval than one"
    made["hosts"]["balanced"] = table(tamiyo=[82.0, 83.0], **rules | {"random": [80.0]})
    file.write_text(json.dumps(made))
    rows = report.quoting(f"{mark}\n<!-- end -->", tmp_path).splitlines()[3:-1]
    assert [row.split(" | ")[0] for row in rows] == [f"| `{host}`" for host in SIX[1:]]


def test_budgets_are_drawn_together(tmp_path: Path) -> None:
    tables = {name: table(grown=[81.5, 82.0], trained_on=[75.0, 75.5 + int(name)]) for name in ("4", "10")}
    described = {"hash": "c0ffee", "commit": None, **replace(EXTEND, tuning=()).content()}
    result = {"protocol": described, "budgets": tables, "contrasts": []}
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "extend.json").write_text(json.dumps(result))
    _, drawings = report.pages(tmp_path)
    assert set(drawings) == {"extend-flops.svg", "extend-seconds.svg"}
    drawing = drawings["extend-flops.svg"]
    assert drawing.count("<polyline") == 2, "a line for each arm"
    assert drawing.count("<circle") == 2 * 2 + 2, "two budgets of two arms and their legend"


def test_a_page_with_figures(tmp_path: Path) -> None:
    one = Tuning(entries=("balanced",), arms=("tamiyo", "uniform"), rates=(0.3, 0.6), seeds=(0, 1))
    described = {"hash": TINY.hash, "commit": "c0ffee", **replace(TINY, tuning=(one,)).content()}
    tables = {"balanced": table(host=[75.0, 76.0], tamiyo=[81.5, 82.0], off=[None, None])}
    result = {"protocol": described, "hosts": tables, "contrasts": analysis.contrasts(TINY, tables)}
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "growth.json").write_text(json.dumps(result))
    page = report.write(tmp_path).read_text()
    assert "75.50 ± 0.71" in page
    assert "| balanced: `tamiyo`, `uniform` | 0.3, 0.6 | 0, 1 | 0.6, the end of what was tried |" in page
    assert "**over host** (primary): tamiyo minus host | 2 | +6.25 points" in page
    assert "**Not complete**: 6 of the protocol's runs are missing" in page
    assert "not measured" in page
    drawing = (folder / "growth-balanced-flops.svg").read_text()
    assert drawing.count("<circle") == 4, "two arms and their legend; what is not measured has no point"
    assert "tamiyo" in drawing
