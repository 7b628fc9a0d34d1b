"""Accuracy against latency: what may stand on one axis, and what is on the front."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distill.reporting import write_comparison
from distill.reporting.front import Measured, Place, front, front_of_run, measured
from tests.run_directories import metrics, run_directory
from tests.unit.reporting.test_report_latency import latency, timing

PLACE = Place("ONNX Runtime 1.2", 1, "Some CPU", 1)
OF_INT8 = {"batches": {"1": {"teacher": timing(0.3), "student": timing(0.2)}}}


def one(ms: float, top1: float) -> Measured:
    return Measured(PLACE, False, "fp32", ms, top1, "name", "words")


def run(folder: Path, **changes: Any) -> Path:
    return run_directory(folder, metrics(**changes), readings=0)


def compared(tmp_path: Path, *runs: Path) -> str:
    page = write_comparison(runs, tmp_path / "comparison.html").read_text()
    return page.split('id="accuracy-against-latency"')[1].split("</section>")[0]


class TestFront:
    def test_it_holds_what_nothing_else_beats_from_fast_to_accurate(self) -> None:
        best = [one(1.0, 80.0), one(2.0, 85.0), one(4.0, 91.0)]
        assert front([one(3.0, 84.0), best[2], one(5.0, 91.0), best[0], one(2.0, 70.0), best[1]]) == best

    def test_of_equals_in_one_measure_the_better_in_the_other_stays(self) -> None:
        assert front([one(1.0, 80.0), one(1.0, 81.0)]) == [one(1.0, 81.0)]
        assert front([one(2.0, 80.0), one(1.0, 80.0)]) == [one(1.0, 80.0)]
        assert front([]) == []


class TestMeasured:
    def test_delivered_files_count_in_their_runtime_and_eager_networks_only_where_there_are_none(self) -> None:
        found = measured(metrics(latency=latency()))
        assert {one.place.batch for one in found} == {1, 8, 64}
        assert {one.place.words for one in found} == {"ONNX Runtime 1.2, 1 thread, on Some CPU"}
        eager = measured(metrics(environment={"device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2.15"}))
        assert {one.place.words for one in eager} == {"eager PyTorch 2.15, 2 threads, on Some CPU"}
        assert [one.name for one in eager] == ["teacher", "student"] * 2

    def test_programs_in_int8_have_their_own_accuracy(self) -> None:
        where = {key: value for key, value in latency(precision="int8").items() if key != "batches"}
        int8 = {"teacher": {"top1": 89.0}, "student": {"top1": 87.0}, "latency": where | OF_INT8}
        found = measured(metrics(latency=latency(), int8=int8))
        assert [(one.name, one.ms, one.top1) for one in found if one.place.batch == 1] == [
            ("teacher", 0.8, 90.0), ("student", 0.4, 88.5), ("teacher, int8", 0.3, 89.0), ("student, int8", 0.2, 87.0),
        ]  # fmt: skip
        asked = measured(metrics(latency=latency(precision="int8"), int8=int8))
        assert {one.top1 for one in asked} == {89.0, 87.0}, "deploy.precision=int8 times the quantised files"
        assert measured(metrics(latency=latency(precision="int8"))) == [], "without their accuracy they have no place"

    def test_a_figure_that_is_missing_has_no_point(self) -> None:
        one = latency()
        one["batches"]["8"]["student"] = {}
        found = measured(metrics(latency=one))
        assert [one.name for one in found if one.place.batch == 8] == ["teacher"]


class TestDrawing:
    def test_a_run_has_its_teacher_as_a_point_and_the_front(self) -> None:
        drawn = front_of_run(metrics(latency=latency()))
        assert drawn.count('class="reference"') == drawn.count('class="front"') == 3
        assert "student: 88.50 %, 0.4 ms" in drawn
        assert ">64 images</b> 2 networks of 2 on the front" in drawn
        assert ">8 images</b> 1 network of 2 on the front" in drawn, "the student is slower there"
        assert 'class="run beaten"' in drawn

    def test_runs_of_one_place_share_their_drawings_and_their_teacher(self, tmp_path: Path) -> None:
        runs = [run(tmp_path / name, latency=latency()) for name in "abc"]
        drawn = compared(tmp_path, *runs)
        assert drawn.count("<h3>") == 1
        assert drawn.count('class="front"') == drawn.count('class="reference"') == 3
        assert "teacher, the median of 3 runs: 90.00 %, 0.8 ms" in drawn
        assert drawn.count('data-s="r2"') == 3 + 1, "three points and an entry of the legend"

    def test_what_was_measured_elsewhere_or_otherwise_has_drawings_of_its_own(self, tmp_path: Path) -> None:
        others = ({"threads": 2}, {"cpu": "Board"}, {"gpu": "Board 2"}, {"runtime": "openvino"}, {"version": "1.3"})
        runs = [run(tmp_path / "one", latency=latency())]
        runs += [run(tmp_path / str(n), latency=latency(**other)) for n, other in enumerate(others)]
        runs += [run(tmp_path / "eager"), run_directory(tmp_path / "unfinished", None)]
        drawn = compared(tmp_path, *runs)
        titles = re.findall("<h3>(.*?)</h3>", drawn)
        assert len(titles) == len(set(titles)) == 2 + len(others)
        assert "In ONNX Runtime 1.2, 2 threads, on Some CPU" in titles
        assert "In ONNX Runtime 1.2, 1 thread, on Board 2" in titles

    def test_the_table_says_where_latencies_are_not_to_be_compared(self, tmp_path: Path) -> None:
        runs = [run(tmp_path / str(n), latency=latency(threads=n)) for n in (1, 2)]
        page = write_comparison(runs, tmp_path / "comparison.html").read_text()
        assert "ms of different places, not to be compared (ONNX Runtime 1.2 (fp32, 1 thread) on Some CPU: 1; " in page
