"""The simulated clock: it agrees with the arithmetic of plans where that is exact, and knows links and windows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span
from distill.planning.network import Link, Network
from distill.planning.placement.plans import plan_broadcast
from distill.planning.plan import STRATEGIES
from distill.planning.relay.relay_plans import plan_groups, plan_relay
from distill.simulation.command import ENOUGH, main, measured, planned
from distill.simulation.hardware import DESCRIBED, Device, load_device
from distill.simulation.simulator import SAMPLE_STEPS, simulate
from distill.storage.files import write_json

COSTS = Costs((1.0, 2.0, 1.0, 3.0), (3.0, 5.0, 4.0, 2.0), (100, 200, 300, 400, 500))


def on(link: Link) -> Costs:
    """The same costs on ranks joined by such links."""
    return replace(COSTS, network=Network(within=link))


seconds = st.floats(0.1, 10.0).map(lambda value: round(value, 2))


def whole(steps: int, blocks: int = 4) -> list[Span]:
    return [Span(block, 0, steps) for block in range(blocks)]


@pytest.mark.parametrize("strategy", ["broadcast", "relay", "replicate", "layerwise", "serial"])
def test_one_rank_alone_takes_exactly_what_its_plan_says(strategy: str) -> None:
    plan = STRATEGIES[strategy].plan(COSTS, whole(20), 1)
    found = simulate(plan, COSTS)
    assert found.makespan_s == pytest.approx(plan.predicted_makespan_s)
    assert found.mean_idle_share == pytest.approx(0.0, abs=1e-9)
    assert found.bytes_sent == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(seconds, seconds), min_size=2, max_size=7), st.integers(2, 3))
def test_several_ranks_take_what_their_plan_says_and_a_few_steps_to_fill(
    costs: list[tuple[float, float]], ranks: int
) -> None:
    teacher, student = (tuple(values) for values in zip(*costs, strict=True))
    problem = Costs(teacher, student, (0,) * (len(costs) + 1))
    for planner in (plan_broadcast, plan_relay):
        plan = planner(problem, whole(50, len(costs)), ranks)
        found = simulate(plan, problem)
        # A rank that is left behind costs rank 0 passes beyond its plan, from time that it has to spare.
        surplus = found.busy_s[0] - plan.predicted_rank_s[0]
        assert surplus >= -1e-6
        assert planner is plan_broadcast or surplus < 1e-6
        assert found.busy_s[1:] == pytest.approx(plan.predicted_rank_s[1:])
        longest, step = max(plan.predicted_rank_s), sum(teacher) + sum(student)
        assert longest - 1e-6 <= found.makespan_s <= longest + 8 * step


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(seconds, seconds), min_size=2, max_size=6), st.integers(2, 4), st.data(), st.sampled_from([2, 4])
)
def test_several_teacher_ranks_never_wait_for_each_other_for_ever(
    costs: list[tuple[float, float]], ranks: int, data: st.DataObject, window: int
) -> None:
    teacher, student = (tuple(values) for values in zip(*costs, strict=True))
    problem = Costs(teacher, student, (50,) * (len(costs) + 1), network=Network(within=Link(1000.0, 0.01, 1e-4)))
    plan = plan_broadcast(problem, whole(50, len(costs)), ranks, data.draw(st.integers(1, ranks)))
    found = simulate(plan, problem, window=window)
    step = sum(teacher) + sum(student)
    assert max(plan.predicted_rank_s) - step < found.makespan_s <= max(plan.predicted_rank_s) + 8 * step
    assert 50 <= found.teacher_passes <= 100


def test_two_teacher_ranks_halve_the_time_of_a_dear_teacher() -> None:
    dear = replace(COSTS, teacher_s=(20.0,) * 4)
    one, two = (simulate(plan_broadcast(dear, whole(80), 2, number), dear).makespan_s for number in (1, 2))
    assert one == pytest.approx(80 * 80.0, rel=0.01)
    assert two == pytest.approx(80 * (80 + 14) / 2, rel=0.05), "students and the teacher's batches are shared out"


def test_groups_take_what_their_plan_says_and_a_few_steps_to_fill() -> None:
    shared = replace(COSTS, student_bytes=(100,) * 4, batch_size=64, network=Network(within=Link(1e4, 1e-3, 1e-4)))
    for ranks in (3, 5, 8):
        plan = plan_groups(shared, whole(60), ranks)
        assert plan.groups
        found = simulate(plan, shared)
        longest = max(plan.predicted_rank_s)
        assert longest - 1e-6 <= found.makespan_s <= longest + 8 * (sum(COSTS.teacher_s) + sum(COSTS.student_s))
        assert found.busy_s == pytest.approx(plan.predicted_rank_s, rel=0.02)


def test_a_slow_link_sets_the_pace() -> None:
    plan = plan_broadcast(COSTS, whole(100), 2)
    sent = simulate(plan, COSTS).bytes_sent
    assert sent > 0
    costs = on(Link(bytes_per_s=10.0))
    slow = simulate(plan, costs)
    assert slow.makespan_s >= slow.bytes_sent / 10.0
    assert slow.makespan_s < 1.2 * slow.bytes_sent / 10.0
    relayed = simulate(plan_relay(COSTS, whole(100), 2), costs)
    assert relayed.bytes_sent < sent
    assert relayed.makespan_s < slow.makespan_s


def test_latency_is_paid_once_and_not_by_every_step() -> None:
    plan = plan_relay(COSTS, whole(100), 2)
    here, far = simulate(plan, COSTS), simulate(plan, on(Link(latency_s=1.0)))
    assert 0 < far.makespan_s - here.makespan_s < 5.0


def test_every_batch_is_taught_once_to_ranks_in_step() -> None:
    assert simulate(plan_broadcast(COSTS, whole(60), 3), COSTS).teacher_passes == 60


def test_a_rank_far_too_slow_is_left_behind_and_costs_passes_of_its_own() -> None:
    slow = Costs(COSTS.teacher_s, COSTS.student_s, COSTS.boundary_bytes, slowness=(1.0, 1.0))
    plan = plan_broadcast(slow, whole(60), 2)
    crawling = Costs(COSTS.teacher_s, COSTS.student_s, COSTS.boundary_bytes, slowness=(1.0, 20.0))
    assert simulate(plan, crawling).teacher_passes > 60


def test_long_plans_are_continued_at_the_pace_of_a_sample() -> None:
    long = 30 * SAMPLE_STEPS
    plan = plan_relay(COSTS, whole(long), 2)
    found = simulate(plan, COSTS)
    assert found.makespan_s == pytest.approx(plan.predicted_makespan_s, rel=0.01)
    assert found.bytes_sent == pytest.approx(long * COSTS.boundary_bytes[plan.starts[1]])
    assert found.teacher_passes == long


ONE_HOST = Network(hosts=(0, 0))


def run_directory(folder: Path, network: Network = ONE_HOST) -> Path:
    folder.mkdir()
    plan = plan_broadcast(COSTS, whole(80), 1)
    write_json(folder / "plan.json", asdict(plan))
    facts = {
        "seconds": {"teacher": COSTS.teacher_s, "student": COSTS.student_s},
        "boundary_bytes": COSTS.boundary_bytes, "student_bytes": [8, 8, 8, 8],
        "network": {"within": network.within.facts(), "between": network.between.facts(), "hosts": network.hosts},
    }  # fmt: skip
    write_json(folder / "costs.json", facts)
    return folder


def imagine(overrides: Sequence[str], device: Device, steps: int | None) -> tuple[Costs, list[Span]]:
    """Stands for what needs torch: costs that depend on the device, whatever the job."""
    assert overrides == ["teacher=resnet50", "data.image_size=224"]
    slower = 1e12 / device.peak("fp32")
    return (
        replace(COSTS, teacher_s=tuple(slower * s for s in COSTS.teacher_s)),
        [Span(block, 0, steps or 60) for block in range(4)],
    )


def command(*arguments: str) -> int:
    return main(arguments, imagine)


def rows_of(text: str) -> list[list[str]]:
    """The lines of the table below its title and two lines of headings."""
    lines = text.splitlines()
    return [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("simulated"))) + 3 :]]


def test_the_command_tells_of_every_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_directory(tmp_path / "run")
    assert command(str(run), "--ranks", "1", "4", "--strategies", "broadcast", "relay", "--gbit", "1") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("one rank: teacher 7000.0 ms, 4 students 14000.0 ms a batch, measured by the run\n")
    assert "links as given, and else as in the run: 1 Gbit/s, 0 ms between any two ranks\n" in shown
    rows = rows_of(shown)
    assert [row[:2] for row in rows] == [["1", "broadcast"], ["1", "relay"], ["4", "broadcast"], ["4", "relay"]]
    assert rows[0][3] == "1.00x"
    assert rows[0][6] == "0.0"
    assert [row[0] for row in rows if row[-1] == "fastest"] == ["1", "4"]
    costs, spans = measured(run, speed=2.0, steps=None)
    assert math.isclose(sum(costs.student_s), sum(COSTS.student_s) / 2)
    assert {span.budget for span in spans} == {80}


def test_a_job_on_a_described_cluster_has_energy_and_says_that_nothing_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = ("teacher=resnet50", "cluster=dgx_h100", "data.image_size=224")
    assert command(*job, "--ranks", "1", "2", "--strategies", "relay", "--steps", "50") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("DGX H100, H100 SXM 80 GB: described from data sheets, not measured\n")
    assert shown.splitlines()[4].split()[-1] == "MJ"
    one, two = rows_of(shown)
    assert (float(one[2]), float(one[3].removesuffix("x"))) == (pytest.approx(50 * (7 / 67 + 14), rel=1e-3), 1.0)
    device = load_device("h100")
    busy = device.board_watts * device.busy_share
    assert float(one[-2]) * 1e6 == pytest.approx(float(one[2].replace(",", "")) * busy, abs=600)
    assert float(two[-2]) > float(one[-2])  # the same work, and idle watts


def test_a_runs_costs_may_be_put_on_a_clusters_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_directory(tmp_path / "run")
    slow = tmp_path / "slow.yaml"
    text = (DESCRIBED / "clusters" / "nodes_rtx_6000.yaml").read_text()
    slow.write_text(text.replace("between_bytes_per_s: 1.25e+9", "between_bytes_per_s: 10"))
    assert command(str(run), f"cluster={slow}", "--ranks", "2", "--strategies", "broadcast") == 0
    shown = capsys.readouterr().out
    assert "links of nodes with one Quadro RTX 6000, described and not measured" in shown
    assert command(str(run), "--ranks", "2", "--strategies", "broadcast") == 0
    free = rows_of(capsys.readouterr().out)
    (row,) = rows_of(shown)
    assert float(row[2].replace(",", "")) > 1.5 * float(free[0][2].replace(",", ""))


RUNS_LINKS = Network(Link(1e3, 1e-3, 2e-3), Link(1e2, 5e-3, 1e-3), hosts=(0, 0, 1))


def test_without_a_given_link_the_runs_own_are_reckoned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_directory(tmp_path / "run", RUNS_LINKS)
    costs, spans = measured(run, speed=2.0, steps=None)
    within, between = (
        replace(x, sender_s_per_byte=x.sender_s_per_byte / 2) for x in (RUNS_LINKS.within, RUNS_LINKS.between)
    )
    assert costs.network == Network(within, between, RUNS_LINKS.hosts)
    assert command(str(run), "--ranks", "2", "4", "--strategies", "broadcast") == 0
    shown = capsys.readouterr().out
    words = "links as in the run: 8e-06 Gbit/s, 1 ms within a host of 2 ranks, 8e-07 Gbit/s, 5 ms between hosts"
    assert shown.splitlines()[1] == words
    costs, spans = measured(run, speed=1.0, steps=None)
    for row, ranks in zip(rows_of(shown), (2, 4), strict=True):
        joined = replace(costs, network=RUNS_LINKS.resized(ranks))
        expected = simulate(STRATEGIES["broadcast"].plan(joined, spans, ranks), joined).makespan_s
        assert float(row[2].replace(",", "")) == pytest.approx(expected, abs=0.06)


def test_what_is_not_given_of_a_link_is_that_of_the_runs_worst_hop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_directory(tmp_path / "run", RUNS_LINKS))
    for option, link in (("--gbit", "1 Gbit/s, 5 ms"), ("--latency-us", "8e-07 Gbit/s, 0.001 ms")):
        assert command(run, "--ranks", "1", option, "1") == 0
        assert f"as in the run: {link} between any two ranks\n" in capsys.readouterr().out


def test_a_run_of_one_host_says_that_all_ranks_are_taken_to_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(run_directory(tmp_path / "run")), "--ranks", "1") == 0
    words = "links as in the run: no limit, 0 ms between the ranks of one host, on which all are taken to be\n"
    assert words in capsys.readouterr().out


def test_teacher_ranks_of_one_host_share_its_way_out() -> None:
    plan = plan_broadcast(COSTS, whole(60), 4, 2)
    assert plan.spans_of(2)
    slow, free = Link(20.0), Link()
    shared, own = (
        simulate(plan, replace(COSTS, network=Network(free, slow, (0, 0, 1, 1), own_adapters=own)))
        for own in (False, True)
    )
    assert shared.bytes_sent == own.bytes_sent
    assert shared.makespan_s > 1.5 * own.makespan_s


def test_the_plot_draws_every_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, drawing = run_directory(tmp_path / "run"), tmp_path / "efficiency.svg"
    arguments = (str(run), "--ranks", "1", "2", "4", "--strategies", "broadcast", "relay", "--plot")
    assert command(*arguments, str(drawing)) == 0
    root = ElementTree.parse(drawing).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert len(root.findall(f".//{svg}polyline")) == 2
    assert len(root.findall(f".//{svg}circle")) == 6
    words = {text.text for text in root.iter(f"{svg}text")}
    assert words >= {"broadcast", "relay", "1", "2", "4", "ranks", "simulated from a run's measured costs"}
    capsys.readouterr()
    assert command(*arguments, str(tmp_path / "efficiency.png")) == 2
    assert "expected a name that ends in .svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["teacher=resnet50"], "cluster: got None; expected cluster=NAME for a job that has not run: dgx_a100"),
        (["teacher=resnet50", "cluster=dgx_h10"], "cluster: got 'dgx_h10'; expected a YAML file, or 'dgx_h100'"),
        (["RUN", "teacher=resnet50"], "simulate: got 'teacher=resnet50'; expected one run directory alone"),
        (["RUN", "OTHER"], "simulate: got 'OTHER'; expected one run directory alone"),
        (["RUN", "cluster=dgx_h100", "--gbit", "10"], "--gbit, --latency-us: got 'given'; expected neither"),
        (["teacher=resnet50", "cluster=dgx_h100", "--speed", "2"], "--speed: got 2.0; expected a run directory"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"distill simulate: {told}")
    assert error.count("\n") == 1


def test_settings_behind_the_numbers_of_ranks_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("cluster=dgx_h100", "--ranks", "4", "teacher=resnet50")
    assert "teacher=resnet50: expected an integer >= 1; a job's settings go before" in capsys.readouterr().err


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(tmp_path)) == 2
    assert "no plan is there" in capsys.readouterr().err
    run = run_directory(tmp_path / "run")
    write_json(run / "costs.json", {"seconds": {"teacher": [], "student": []}})
    assert command(str(run)) == 2
    assert "written by an older version" in capsys.readouterr().err
    (run / "costs.json").write_text('{"seconds": ')
    assert command(str(run)) == 2
    error = capsys.readouterr().err
    assert "costs.json: damaged (" in error
    assert "plan again" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--latency-us", "-5", ">= 0"), ("--latency-us", "nan", ">= 0"), ("--gbit", "0", "> 0"), ("--gbit", "inf", "> 0")],
)
def test_a_link_that_cannot_be_is_refused(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command("RUN", option, value)
    assert ended.value.code == 2
    assert f"{value}: expected a number {expected}" in capsys.readouterr().err


def test_ranks_that_a_plan_cannot_use_are_left_idle() -> None:
    found = simulate(planned("broadcast", COSTS, whole(20), 300), COSTS)
    assert found.plan.world_size == len(found.busy_s) == 300
    assert sum(busy > 0 for busy in found.busy_s) <= ENOUGH * 4
    assert found.makespan_s == simulate(planned("broadcast", COSTS, whole(20), ENOUGH * 4), COSTS).makespan_s
    groups = planned("groups", replace(COSTS, batch_size=128), whole(20), 300)
    assert sum(groups.has_work(rank) for rank in range(300)) > ENOUGH * 4
