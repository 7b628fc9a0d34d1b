"""The page and the tables of a run, from a small made-up run directory."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill.plan import Costs, Span
from distill.report import plan_table, result_table, write_report
from distill.strategies import plan_broadcast

EVIL = "<script>alert('x')</script> & \"co\""


def network(**changes: Any) -> dict[str, Any]:
    return {
        "name": "resnet", "top1": 90.0, "top5": 99.0, "params": 1000, "replaced_params": 800, "bytes": 4000,
        "flops": 2_000_000, "latency_ms_batch1": 2.0, "latency_ms_batch64": 30.0,
    } | changes  # fmt: skip


def block(index: int, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "block": index, "name": name, "rank": index % 2, "steps": 200, "status": "finished", "rel_error_first": 0.9,
        "rel_error_last": 0.1234, "seconds": 3.5,
    } | changes  # fmt: skip


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": network(),
        "student": network(top1=88.5, top1_assembled=40.0, top1_recalibrated=85.0, params=250, flops=500_000),
        "data": {"name": "digits"},
        "blocks": [block(0, "layer1.0"), block(1, "layer2.0"), block(2, EVIL, status="diverged")],
        "distill": {
            "strategy": "broadcast", "world_size": 2, "seconds": 12.34, "makespan_predicted_s": 11.0,
            "images_per_second": 1234.0, "idle_share": [0.05, 0.25], "cpu_seconds": 20.0, "bytes_sent": 3_000_000,
        },
        "environment": {"device": EVIL},
        "seed": 7,
        "fingerprint": "0123456789abcdef",
    } | changes  # fmt: skip


def run_directory(folder: Path, content: dict[str, Any], *, readings: int = 5) -> Path:
    (folder / "metrics").mkdir()
    (folder / "metrics.json").write_text(json.dumps(content))
    for rank in (0, 1):
        lines = [
            json.dumps({"block": one["block"], "step": 20 * step, "relative_error": 0.9 / step, "loss": 1.0})
            for one in content["blocks"]
            if one["rank"] == rank
            for step in range(1, readings + 1)
        ]
        (folder / "metrics" / f"rank{rank}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def shown(table: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class TestResultTable:
    def test_shows_teacher_student_and_ratio(self) -> None:
        text = shown(result_table(metrics()))
        assert re.search(r"parameters +1,000 +250 +0\.250", text)
        assert re.search(r"MFLOP per image \(2 per multiply-add\) +2\.00 +0\.50 +0\.250", text)

    def test_accuracies_differ_in_points(self) -> None:
        text = shown(result_table(metrics()))
        assert re.search(r"top-1, assembled +90\.00 % +40\.00 % +-50\.00 points", text)
        assert re.search(r"top-1, batch norms re-estimated +90\.00 % +85\.00 % +-5\.00 points", text)
        assert re.search(r"top-1 +90\.00 % +88\.50 % +-1\.50 points", text)

    def test_nothing_replaced_has_no_ratio(self) -> None:
        content = metrics(teacher=network(replaced_params=0))
        assert re.search(r"replaced convolutions +0 +800 +-", shown(result_table(content)))


class TestReport:
    def test_page_has_every_block_with_its_numbers(self, tmp_path: Path) -> None:
        page = write_report(run_directory(tmp_path, metrics())).read_text()
        assert page.count("<figure>") == 3
        for name in ("layer1.0", "layer2.0"):
            assert f"<td>{name}</td>" in page
            assert f'aria-label="{name}"' in page
        assert page.count("<td>0.1234</td>") == 3
        assert "<td>diverged</td>" in page

    def test_page_shows_prediction_beside_measurement(self, tmp_path: Path) -> None:
        page = write_report(run_directory(tmp_path, metrics())).read_text()
        assert "<td>distill stage, measured</td><td>12.3 s</td>" in page
        assert "<td>distill stage, predicted</td><td>11.0 s</td>" in page
        assert "<td>5.0 %, 25.0 %</td>" in page

    def test_names_are_escaped_and_there_is_no_script(self, tmp_path: Path) -> None:
        content = metrics(teacher=network(name=EVIL), data={"name": EVIL})
        page = write_report(run_directory(tmp_path, content)).read_text()
        assert "<script" not in page.lower()
        assert page.count("&lt;script&gt;") >= 5  # title, heading, table, figure, environment
        assert 'aria-label="&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;co&quot;"' in page

    def test_page_asks_nothing_of_the_network(self, tmp_path: Path) -> None:
        page = write_report(run_directory(tmp_path, metrics())).read_text()
        assert "http" not in page
        assert "url(" not in page

    def test_page_of_a_long_run_stays_under_a_megabyte(self, tmp_path: Path) -> None:
        # One curve of 5000 readings may take a hundredth of it: there are networks with a hundred blocks.
        run_directory(tmp_path, metrics(blocks=[block(0, "layer1.0")]), readings=2)
        short = write_report(tmp_path).stat().st_size
        with (tmp_path / "metrics" / "rank0.jsonl").open("a") as file:
            for step in range(3, 5000):
                file.write(json.dumps({"block": 0, "step": 20 * step, "relative_error": 1 / step}) + "\n")
        page = write_report(tmp_path)
        assert page.stat().st_size - short < 10_000
        assert "0.9 to 0.0002, 99980 steps" in page.read_text()

    def test_a_block_without_readings_says_so(self, tmp_path: Path) -> None:
        page = write_report(run_directory(tmp_path, metrics(), readings=0)).read_text()
        assert page.count(": no readings</figcaption>") == 3

    def test_errors_that_are_not_numbers_do_not_reach_the_curve(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        with (tmp_path / "metrics" / "rank0.jsonl").open("a") as file:
            for bad in (math.nan, math.inf, 0.0):
                file.write(json.dumps({"block": 0, "step": 500, "relative_error": bad}) + "\n")
        page = write_report(tmp_path).read_text()
        assert not re.search(r'points="[^"]*(nan|inf)', page)
        assert page.count("<polyline") == 3

    def test_a_half_written_reading_does_not_cost_the_report(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        with (tmp_path / "metrics" / "rank1.jsonl").open("a") as file:
            file.write('{"block": 1, "st')
        assert write_report(tmp_path).read_text().count("<polyline") == 3

    def test_costs_are_shown_where_there_are_some(self, tmp_path: Path) -> None:
        costs = {
            "blocks": [EVIL, "layer2.0"],
            "seconds": {"teacher": [0.001, 0.002], "student": [0.004, 0.0]},
            "flops": {"teacher": [3e6, 4e6], "student": [5e6, 0]},
        }
        assert "Cost of a block" not in write_report(run_directory(tmp_path, metrics())).read_text()
        (tmp_path / "costs.json").write_text(json.dumps(costs))
        page = write_report(tmp_path).read_text()
        assert "<td>layer2.0</td><td>2.0</td><td>-</td><td>4</td><td>-</td>" in page
        assert "<script" not in page


class Costly:
    """Costs by block, as the report wants them."""

    def __init__(self, teacher: list[float], student: list[float]) -> None:
        self.teacher, self.student = teacher, student


def test_plan_table_shows_both_costs_and_who_trains_what() -> None:
    plan = plan_broadcast(
        Costs((0.001, 0.001, 0.001), (0.0, 0.004, 0.004), (10,) * 4), [Span(1, 0, 9), Span(2, 5, 9)], 2
    )
    text = shown(
        plan_table(
            plan,
            ["stem", "layer1", "layer2"],
            costs=Costly([0.001] * 3, [0.0, 0.004, 0.005]),
            flops=Costly([2e6] * 3, [0.0, 7e6, 8e6]),
            boundary_bytes=[1_000_000] * 4,
        )
    )
    assert "plan: broadcast on 2 ranks" in text
    assert re.search(r"stem +- +- +1\.0 +- +2 +- +1\.00", text)
    assert re.search(r"layer1 +[01] +0-9 +1\.0 +4\.0 +2 +7 +1\.00", text)
    assert re.search(r"layer2 +[01] +5-9 +1\.0 +5\.0 +2 +8 +1\.00", text)


@pytest.mark.parametrize("key", ["teacher", "student", "blocks", "distill"])
def test_a_run_whose_metrics_lack_a_section_has_no_report(tmp_path: Path, key: str) -> None:
    content = metrics()
    run_directory(tmp_path, content)
    del content[key]
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(KeyError, match=key):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
