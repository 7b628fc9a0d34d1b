"""Placement of independent blocks: no placement of a small problem is better, and every gap that is told holds."""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from distill.planning.costs import Costs, Span
from distill.planning.network import Link, Network
from distill.planning.placement.packing import Packing
from distill.planning.placement.plans import plan_broadcast, plan_layerwise, plan_replicate
from distill.planning.placement.problems import broadcast_problem, layerwise_problem, replicate_problem
from distill.planning.placement.search import TOLERANCE, Problem, largest_first, place
from distill.planning.plan import Plan

LAYER_TIMES = Path(__file__).parents[4] / "shared" / "data" / "vgg_layer_seconds.csv"
PROBLEMS = {"broadcast": broadcast_problem, "layerwise": layerwise_problem, "replicate": replicate_problem}
needs_layer_times = pytest.mark.skipif(
    not LAYER_TIMES.exists(), reason="the first paper's layer times are not beside the repository"
)
MANY = 1 + TOLERANCE  # within which a placement counts as optimal


def wire(sender_s_per_byte: float) -> Network:
    return Network(within=Link(sender_s_per_byte=sender_s_per_byte))


def whole(blocks: int) -> list[Span]:
    return [Span(block, 0, 10) for block in range(blocks)]


@st.composite
def instances(draw: st.DrawFn, least: int = 2, most: int = 7) -> tuple[Costs, list[Span], int]:
    blocks, ranks = draw(st.integers(least, most)), draw(st.integers(1, 3))
    seconds = st.floats(0.1, 10.0).map(lambda value: round(value, 3))
    costs = Costs(
        tuple(draw(st.lists(seconds.map(lambda value: value / 5), min_size=blocks, max_size=blocks))),
        tuple(draw(st.lists(seconds, min_size=blocks, max_size=blocks))),
        tuple(draw(st.lists(st.integers(1, 9), min_size=blocks + 1, max_size=blocks + 1))),
        slowness=tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=ranks, max_size=ranks))),
        network=wire(draw(st.sampled_from([0.0, 0.01, 0.3]))),
    )
    return costs, whole(blocks), ranks


def random_costs(kind: str, blocks: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return generator.uniform(1, 100, blocks)
    if kind == "lognormal":
        return generator.lognormal(0, 1, blocks)
    stages = np.repeat(generator.uniform(1, 5, 4), -(-blocks // 4))[:blocks]
    return stages * generator.normal(1, 0.02, blocks)


@settings(max_examples=60, deadline=None)
@given(instances(), st.integers(1, 3))
def test_no_placement_of_a_small_broadcast_is_better(
    instance: tuple[Costs, list[Span], int], teacher_ranks: int
) -> None:
    costs, spans, ranks = instance
    teacher_ranks = min(teacher_ranks, ranks)
    problem = broadcast_problem(costs, spans, ranks, teacher_ranks)
    placements = itertools.product(range(ranks), repeat=len(spans))
    optimum = min(problem.packing.seconds(np.array(owner)).max() for owner in placements)
    plan = plan_broadcast(costs, spans, ranks, teacher_ranks)
    assert plan.predicted_makespan_s == pytest.approx(optimum, rel=1e-9)
    assert plan.gap == 0
    shared = sum(costs.student_s) * 10 / sum(1 / costs.slowness_of(rank) for rank in range(ranks))
    assert plan.predicted_makespan_s >= shared * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(instances(), st.integers(1, 3), st.data())
def test_arrays_and_arithmetic_of_a_placement_agree(
    instance: tuple[Costs, list[Span], int], teacher_ranks: int, data: st.DataObject
) -> None:
    costs, spans, ranks = instance
    problem = broadcast_problem(costs, spans, ranks, min(teacher_ranks, ranks))
    owner = data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(spans), max_size=len(spans)))
    assert problem.packing.seconds(np.array(owner)) == pytest.approx(problem.seconds(dict(enumerate(owner))))


@settings(max_examples=25, deadline=None)
@given(instances(most=11), st.sampled_from(["broadcast", "layerwise", "replicate"]))
def test_a_gap_that_is_told_holds(instance: tuple[Costs, list[Span], int], strategy: str) -> None:
    """Beyond what is searched whole; the optimum is that of a mixed-integer programme of another kind."""
    costs, spans, ranks = instance
    costs = Costs(costs.teacher_s, costs.student_s, costs.boundary_bytes, slowness=costs.slowness)
    plan = {"broadcast": plan_broadcast, "layerwise": plan_layerwise, "replicate": plan_replicate}[strategy](
        costs, spans, ranks
    )
    optimum = assigned(costs, strategy, len(spans), ranks)
    assert plan.predicted_makespan_s <= optimum * (1 + plan.gap) * MANY
    assert plan.predicted_makespan_s >= optimum * (1 - 1e-6)


@settings(max_examples=20, deadline=None)
@given(instances(least=10, most=10), st.sampled_from(["broadcast", "layerwise", "replicate"]))
def test_beyond_what_is_searched_the_bound_is_below_the_optimum(
    instance: tuple[Costs, list[Span], int], strategy: str
) -> None:
    costs, spans, ranks = instance
    problem = PROBLEMS[strategy](costs, spans, ranks)
    optimum = least_of_all(problem.packing)
    found = place(problem)
    assert found.bound_s <= optimum * (1 + 1e-9)
    assert optimum * (1 - 1e-9) <= max(found.rank_s) <= optimum * (1 + found.gap) * MANY


def least_of_all(packing: Packing) -> float:
    """The makespan of the best of all placements with one teacher rank."""
    owners = np.array(list(itertools.product(range(packing.num_ranks), repeat=packing.num_blocks)))
    chosen = [(owners == rank).astype(float) for rank in range(packing.num_ranks)]
    loads = [packing.base_s[r] + packing.slowness[r] * packing.own_s(one) for r, one in enumerate(chosen)]
    for rank in range(1, packing.num_ranks):
        loads[0] = loads[0] + packing.slowness[0] * packing.price[rank] * packing.sent_s(chosen[rank])
    return float(np.max(loads, axis=0).min())


@pytest.mark.parametrize(
    ("strategy", "ranks", "blocks_a_rank", "proven", "largest_gap"),
    [
        ("broadcast", (3, 9), (3, 6), 0.8, 0.01),
        ("layerwise", (8, 14), (2, 3), 0.6, 0.1),
        ("replicate", (6, 16), (1, 3), 0.8, 0.05),
    ],
)
def test_most_hard_problems_are_proven_optimal_and_none_is_far_from_it(
    strategy: str, ranks: tuple[int, int], blocks_a_rank: tuple[int, int], proven: float, largest_gap: float
) -> None:
    """Few blocks a rank, where neither work spread evenly nor the largest block decides; a broadcast has dear links and
    ranks of different speed."""
    gaps = []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        number = int(generator.integers(*ranks))
        blocks = int(number * generator.uniform(*blocks_a_rank))
        student = random_costs(["uniform", "stages"][seed % 2], blocks, seed)
        costs = Costs(
            tuple(student / (1e9 if strategy == "layerwise" else 4)),
            tuple(student),
            tuple(generator.integers(1, 64, blocks + 1)),
            slowness=tuple(generator.choice([1.0, 2.0], number)) if strategy == "broadcast" else (),
            network=wire(0.001 * student.mean()),
        )
        gaps.append(place(PROBLEMS[strategy](costs, whole(blocks), number)).gap)
    assert np.mean([gap == 0 for gap in gaps]) >= proven
    assert max(gaps) < largest_gap


@settings(max_examples=12, deadline=None)
@given(instances(most=5), st.sampled_from(["broadcast", "replicate"]), st.integers(1, 3), st.data())
def test_no_placement_that_fits_in_memory_is_better(
    instance: tuple[Costs, list[Span], int], strategy: str, teacher_ranks: int, data: st.DataObject
) -> None:
    costs, spans, ranks = instance
    number = {"teacher_ranks": min(teacher_ranks, ranks)} if strategy == "broadcast" else {}
    problem = PROBLEMS[strategy](costs, spans, ranks, **number)
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(spans), max_size=len(spans))), float)
    room = np.full(ranks, np.ceil(data.draw(st.sampled_from([0.9, 1.0, 1.3])) * sizes.sum() / ranks))
    packing = replace(problem.packing, bytes=sizes, room=room)
    owners = [np.array(owner) for owner in itertools.product(range(ranks), repeat=len(spans))]
    fitting = [owner for owner in owners if (np.bincount(owner, sizes, ranks) <= room).all()]
    found = place(replace(problem, packing=packing))
    owner = np.array([found.rank_of[span.unit] for span in spans])
    if fitting:
        optimum = min(packing.seconds(owner).max() for owner in fitting)
        assert (np.bincount(owner, sizes, ranks) <= room).all()
        assert found.bound_s <= optimum * (1 + 1e-9)
        assert max(found.rank_s) <= optimum * (1 + found.gap) * MANY


def test_largest_blocks_go_to_ranks_that_have_room_for_them() -> None:
    costs = Costs((0.0,) * 4, (9.0, 8.0, 2.0, 1.0), (0,) * 5)
    packing = layerwise_problem(costs, whole(4), 2).packing
    tight = replace(packing, bytes=np.array([1.0, 1.0, 3.0, 3.0]), room=np.array([2.0, 6.0]))
    assert largest_first(packing).tolist() == [0, 1, 1, 0]
    assert largest_first(tight).tolist() == [0, 1, 1, 1]
    nowhere = replace(tight, room=np.array([1.0, 2.0]))
    assert set(largest_first(nowhere).tolist()) <= {0, 1}


def hard_problem() -> Problem:
    student = random_costs("stages", 20, 1)
    costs = Costs(tuple(student / 4), tuple(student), tuple(range(1, 22)), network=wire(0.01 * student.mean()))
    return broadcast_problem(costs, whole(20), 4)


def test_the_same_problem_is_placed_in_the_same_way_again() -> None:
    assert place(hard_problem()) == place(hard_problem())


@pytest.mark.parametrize("answer", [{"x": None}, {"mip_dual_bound": math.nan}, {"mip_dual_bound": None}])
def test_a_plan_is_made_whatever_becomes_of_the_programme(
    answer: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem = hard_problem()

    def fails(cost: np.ndarray, **_: object) -> OptimizeResult:
        return OptimizeResult({"x": 0.4 * np.ones(len(cost)), "mip_dual_bound": 0.1, "message": "no memory"} | answer)

    monkeypatch.setattr(scipy.optimize, "milp", fails)
    found = place(problem)
    assert sorted(found.rank_of) == list(range(20))
    assert found.bound_s == pytest.approx(problem.packing.simple_bound())
    assert "no memory" in caplog.text


def test_one_block_more_than_ranks_pairs_the_two_smallest() -> None:
    student = (30.0, 31.0, 33.0, 35.0, 36.0, 37.0, 38.0, 38.5, 39.0, 39.5, 40.0)
    problem = layerwise_problem(Costs((0.0,) * 11, student, (0,) * 12), whole(11), 10)
    found = place(problem)
    assert max(found.rank_s) == pytest.approx(610.0)
    assert found.gap == 0


def test_replicas_of_a_dear_teacher_are_bounded_by_the_teachers_that_must_run() -> None:
    student = random_costs("lognormal", 60, 29)
    costs = Costs(tuple(student / 4), tuple(student), (0,) * 61)
    problem = replicate_problem(costs, whole(60), 5)
    assert problem.packing.simple_bound() > 1.2 * problem.packing.work_s.sum() / 5
    assert place(problem).gap < 0.02


def assigned(costs: Costs, strategy: str, blocks: int, ranks: int) -> float:
    """The optimum by one variable a block and rank, without prices of sending; 10 steps of every block."""
    prefix = np.cumsum(costs.teacher_s)
    work = 10 * (np.array(costs.student_s) + (prefix if strategy == "layerwise" else 0))
    slow = np.array([costs.slowness_of(rank) for rank in range(ranks)])
    base = np.zeros(ranks)
    if strategy == "broadcast":
        base[0] = 10 * prefix[-1] * slow[0]
    count = blocks * ranks
    loads = np.zeros((ranks, count + ranks + 1))  # variables: block on rank; a rank's depth of teacher; makespan
    depth = np.zeros((count, count + ranks + 1))
    once = np.zeros((blocks, count + ranks + 1))
    for rank in range(ranks):
        loads[rank, [-1, count + rank]] = -1, slow[rank]
        for block in range(blocks):
            loads[rank, block * ranks + rank] = work[block] * slow[rank]
            once[block, block * ranks + rank] = 1
            if strategy == "replicate":
                depth[block * ranks + rank, [count + rank, block * ranks + rank]] = -1, 10 * prefix[block]
    solved = milp(
        np.eye(count + ranks + 1)[-1],
        integrality=np.concatenate([np.ones(count), np.zeros(ranks + 1)]),
        bounds=Bounds(0, np.concatenate([np.ones(count), np.full(ranks + 1, np.inf)])),
        constraints=[
            LinearConstraint(loads, -np.inf, -base),
            LinearConstraint(depth, -np.inf, 0),
            LinearConstraint(once, 1, 1),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    assert solved.success
    return float(solved.fun)


@pytest.mark.parametrize(("blocks", "ranks"), [(30, 2), (64, 2), (54, 8), (64, 8), (24, 10), (64, 48), (64, 64)])
@pytest.mark.parametrize("kind", ["uniform", "lognormal", "stages"])
def test_up_to_64_blocks_on_64_ranks_are_proven_optimal_at_once(kind: str, blocks: int, ranks: int) -> None:
    costs = Costs((0.0,) * blocks, tuple(random_costs(kind, blocks, 3)), (0,) * (blocks + 1))
    started = time.process_time()
    plan = plan_layerwise(costs, whole(blocks), ranks)
    assert time.process_time() - started < 3.0  # a second on a quiet machine
    assert plan.gap == 0
    work = 10 * np.array(costs.student_s)
    assert max(plan.predicted_rank_s) >= max(work.sum() / ranks, work.max()) * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "stages"])
def test_ranks_of_different_speed_that_pay_for_sending_are_near_the_optimum(kind: str) -> None:
    student = random_costs(kind, 48, 5)
    slow = tuple(np.random.default_rng(5).choice([1.0, 2.0], 12))
    price = wire(0.01 * student.mean())
    costs = Costs(tuple(student / 4), tuple(student), (1,) * 49, slowness=slow, network=price)
    plan = plan_broadcast(costs, whole(48), 12)
    assert plan.gap < 0.02


def test_two_hundred_blocks_are_placed_in_seconds() -> None:
    student = random_costs("lognormal", 200, 7)
    costs = Costs(tuple(student / 4), tuple(student), (1,) * 201, network=wire(0.01))
    started = time.process_time()
    plan = plan_broadcast(costs, whole(200), 8)
    assert time.process_time() - started < 5.0
    assert plan.gap < 0.1  # the bound does not know what sending costs
    assert plan_layerwise(costs, whole(200), 8).gap == 0


def test_a_gap_is_kept_with_the_plan() -> None:
    plan = Plan("broadcast", ((0,),), (Span(0, 0, 1),), 1.0, (1.0,), gap=0.25)
    assert Plan.from_json(plan.to_json()).gap == 0.25


def measured_layers() -> dict[str, dict[int, dict[str, float]]]:
    """Seconds by set-up, number of GPUs and layer; those of the published runs that have all layers."""
    rows = list(csv.DictReader(LAYER_TIMES.read_text().splitlines()))
    found: dict[str, dict[int, dict[str, float]]] = {}
    for column in rows[0]:
        setup, _, gpus = column.rpartition("__")
        seconds = {row["layer_name"]: float(row[column]) for row in rows if setup and row[column]}
        if setup and len(seconds) == len(rows):
            found.setdefault(setup, {})[int(gpus.removesuffix("gpu"))] = seconds
    return found


@needs_layer_times
@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_the_first_papers_layers_are_never_placed_above_the_optimum(gpus: int) -> None:
    alone = [list(by_gpus[1].values()) for by_gpus in measured_layers().values() if 1 in by_gpus]
    assert len(alone) >= 4
    for layers, optimum in zip(np.array(alone), subset_optimum(np.array(alone), gpus), strict=True):
        problem = layers_problem(layers, gpus)
        assert max(place(problem).rank_s) == pytest.approx(optimum, rel=1e-9)
        assert optimum <= max(layers[first::gpus].sum() for first in range(gpus))  # round robin
        assert problem.packing.simple_bound() <= optimum


@needs_layer_times
@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_the_first_papers_schedules_are_never_better(gpus: int) -> None:
    """With the layer times of one GPU, and with those of runs on as many GPUs as there are."""
    found = list(measured_layers().values())
    assert sum(gpus in by_gpus for by_gpus in found) >= 3
    for layers in [list(by_gpus[number].values()) for by_gpus in found for number in {1, gpus} & set(by_gpus)]:
        ours = place(layers_problem(layers, gpus))
        assert ours.gap == 0
        assert max(ours.rank_s) <= next_available(layers, gpus) * (1 + 1e-9)
        assert max(ours.rank_s) <= next_available(sorted(layers, reverse=True), gpus) * (
            1 + 1e-9
        )  # bins, largest first


def layers_problem(layers: Sequence[float], gpus: int) -> Problem:
    costs = Costs((0.0,) * len(layers), tuple(layers), (0,) * (len(layers) + 1))
    return layerwise_problem(costs, [Span(block, 0, 1) for block in range(len(layers))], gpus)


def next_available(layers: Sequence[float], gpus: int) -> float:
    """The makespan where every layer in turn goes to the GPU that is done first."""
    busy = np.zeros(gpus)
    for seconds in layers:
        busy[busy.argmin()] += seconds
    return float(busy.max())


def subset_optimum(layers: np.ndarray, gpus: int) -> np.ndarray:
    """The optima for several set-ups (set-ups, layers), by dynamic programming over all subsets of the layers."""
    subsets = (np.arange(2 ** layers.shape[1])[:, None] >> np.arange(layers.shape[1])) & 1
    total = layers @ subsets.T
    best = total
    for left in range(gpus - 2, -1, -1):
        following = total.copy()
        for subset in range(len(subsets)) if left else [len(subsets) - 1]:  # at last the whole network alone counts
            part = inside(subset)
            following[:, subset] = np.maximum(total[:, part], best[:, subset ^ part]).min(axis=1)
        best = following
    return best[:, -1]


def inside(subset: int) -> np.ndarray:
    """All subsets of a subset, as the numbers whose bits they are."""
    found = np.zeros(1, dtype=int)
    for bit in range(subset.bit_length()):
        if subset >> bit & 1:
            found = np.concatenate([found, found | 1 << bit])
    return found


def test_empty_ranks_on_hosts_that_cost_differently_to_serve_are_not_taken_for_alike() -> None:
    """Rank 2 is on the teacher's host, rank 1 is not: it is the former that is to share the work."""
    far = Network(between=Link(sender_s_per_byte=1e-2), hosts=(0, 1, 0))
    costs = Costs((1.0, 1.0), (5.0, 5.0), (1000,) * 3, network=far)
    found = place(broadcast_problem(costs, [Span(0, 0, 10), Span(1, 0, 10)], 3))
    assert max(found.rank_s) == 70.0
    assert sorted(found.rank_of.values()) == [0, 2]
