"""Several runs compared, the command that does it, and the axes that all plots use."""

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distill.observability.numbers import show, show_count, show_seconds, show_short
from distill.reporting import comparison_table, write_comparison
from distill.reporting.command import main
from distill.reporting.plot import Axis
from tests.run_directories import EVIL, metrics, network, planned, run_directory


def run(folder: Path, *, ranks: int, seconds: float, fingerprint: str = "f", top1: float = 88.5, rank: int = 2) -> Path:
    distill = metrics()["distill"] | {"world_size": ranks, "seconds": seconds}
    student = metrics()["student"] | {"top1": top1, "params": 100 * rank}
    run_directory(folder, metrics(distill=distill, student=student, fingerprint=fingerprint))
    (folder / "resolved.yaml").write_text(f"student:\n  rank: {rank}\nrun:\n  dir: {folder}\n")
    return folder


def shown(runs: list[Path]) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    return console.export_text()


@pytest.fixture
def some(tmp_path: Path) -> list[Path]:
    """Two runs of one job on one and on two ranks, a third job, an unfinished run and a missing one."""
    unfinished = planned(run_directory(tmp_path / "d", None), blocks=3, ranks=2)
    return [
        run(tmp_path / "a", ranks=1, seconds=20.0),
        run(tmp_path / "b", ranks=2, seconds=10.5),
        run(tmp_path / "c", ranks=2, seconds=40.0, fingerprint="other", rank=4, top1=89.5),
        unfinished,
        tmp_path / "missing",
    ]


class TestTable:
    def test_speed_up_is_over_the_fewest_ranks_of_the_same_job(self, some: list[Path]) -> None:
        text = shown(some)
        assert "speed-up over the fewest ranks of the same job" in text
        assert re.search(r" 1 .* 20\.0 s .* 1\.00x", text)
        assert re.search(r" 2 .* 10\.5 s .* 1\.90x", text)
        assert re.search(r" 3 .* - +not measured", text)

    def test_among_different_jobs_it_is_over_the_slowest(self, tmp_path: Path) -> None:
        runs = [run(tmp_path / n, ranks=1, seconds=s, fingerprint=n) for n, s in (("a", 10.0), ("b", 40.0))]
        text = shown(runs)
        assert "speed-up over the slowest run" in text
        assert "same job" not in text
        assert re.search(r" 1 .* 4\.00x", text)

    def test_failed_and_missing_runs_have_a_row_that_says_so(self, some: list[Path]) -> None:
        text = shown(some)
        assert re.search(r"4 \S*/d .* unfinished in distill", text)
        assert re.search(r"5 \S*/missing .* missing", text)

    def test_it_tells_the_settings_that_differ_and_no_others(self, some: list[Path]) -> None:
        text = shown(some[:3])
        assert "student.rank=2" in text
        assert "student.rank=4" in text
        assert "run.dir" not in text

    def test_it_fits_a_pipe_with_the_latency_and_nothing_cut_off(
        self, some: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        main([*map(str, some[:3]), "--output", str(some[0].parent / "comparison.html")])
        lines = capsys.readouterr().out.splitlines()[:-1]
        assert max(map(len, lines)) <= 100
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
        assert re.search(r" 2 +2 +88\.50 % +-1\.50 +200 +500 k +2\.00 +30\.0 +10\.5 s +1\.90x +not", "\n".join(lines))

    def test_no_runs_make_an_empty_table(self) -> None:
        assert "0 runs" in shown([])


class TestPage:
    def test_it_has_the_table_the_plots_and_links_to_the_runs(self, some: list[Path], tmp_path: Path) -> None:
        (some[0] / "report.html").write_text("")
        page = write_comparison(some, tmp_path / "comparison.html").read_text()
        points = 5 * 3 + 2
        assert len(re.findall('class="run( beaten)?"', page)) == points, "five plots of students, and one of speed-up"
        assert page.count('class="reference"') == 4, "the teacher, against parameters, FLOPs and latency at two batches"
        assert '<a href="a/report.html">' in page
        assert "Most accurate: 3 (89.50 %, 400 parameters). Smallest: 1" in page

    def test_different_jobs_have_no_plot_of_their_speed_up(self, tmp_path: Path) -> None:
        runs = [run(tmp_path / str(n), ranks=n, seconds=20.0 / n, fingerprint=str(n)) for n in (1, 2)]
        page = write_comparison(runs, tmp_path / "comparison.html").read_text()
        assert "speed-up over\nthe slowest run</th>" in page
        assert "Speed-up against ranks" not in page
        assert 'class="ideal"' not in page

    def test_the_ideal_line_is_drawn_where_all_start_from_as_many_ranks(self, some: list[Path], tmp_path: Path) -> None:
        assert 'class="ideal"' in write_comparison(some, tmp_path / "comparison.html").read_text()
        others = [run(tmp_path / f"other{n}", ranks=n, seconds=60.0 / n, fingerprint="other") for n in (2, 4)]
        assert 'class="ideal"' not in write_comparison([*some[:2], *others], tmp_path / "comparison.html").read_text()

    def test_runs_that_all_failed_still_make_a_page(self, some: list[Path], tmp_path: Path) -> None:
        page = write_comparison(some[3:], tmp_path / "comparison.html").read_text()
        assert "No run has a student yet." in page
        assert "<circle" not in page

    def test_names_are_escaped(self, tmp_path: Path) -> None:
        content = metrics(teacher=network(name=EVIL))
        folder = run_directory(tmp_path / EVIL.replace("/", "|"), content)
        page = write_comparison([folder, folder], tmp_path / "comparison.html").read_text()
        assert page.count("<script") == 1


class TestCommand:
    def test_one_run_is_drawn_again_and_its_page_named(
        self, some: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(some[0])]) == 0
        assert capsys.readouterr().out == f"{some[0]}/report.html\n"
        assert (some[0] / "report.html").exists()

    def test_a_folder_of_runs_is_compared(self, some: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(some[0].parent)]) == 0
        assert capsys.readouterr().out.endswith(f"{some[0].parent}/comparison.html\n")

    def test_several_runs_go_to_the_named_page(self, some: list[Path], tmp_path: Path) -> None:
        assert main([str(some[0]), str(some[3]), "--output", str(tmp_path / "new" / "page.html")]) == 0
        assert "2 runs compared" in (tmp_path / "new" / "page.html").read_text()

    @pytest.mark.parametrize("wrong", ["nowhere", "empty", "file.txt"])
    def test_a_wrong_path_is_one_line_that_says_what_is_expected(
        self, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.txt").write_text("")
        assert main([str(tmp_path / wrong)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"distill report: {tmp_path / wrong}: no ")
        assert "expected a run directory" in told
        assert told.count("\n") == 1

    def test_a_folder_as_output_is_refused(self, some: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(some[0]), "--output", str(some[0])]) == 2
        assert "that is a folder" in capsys.readouterr().err

    def test_it_runs_without_torch_and_inside_a_rank_environment(self, some: list[Path]) -> None:
        program = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('distill', run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", program, "report", str(some[0])],
            env={"RANK": "0", "WORLD_SIZE": "2", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{some[0]}/report.html\n"


class TestAxis:
    numbers = st.lists(st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-9), min_size=1, max_size=20)

    @given(numbers, st.integers(2, 8))
    def test_a_linear_axis_holds_its_values_and_has_few_round_ticks(self, values: list[float], most: int) -> None:
        axis = Axis.around(values)
        assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
        assert 2 <= len(axis.ticks(most)) <= most
        assert all(-1e-6 <= axis.at(tick) <= 1 + 1e-6 for tick in axis.ticks(most))

    @given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20), st.integers(2, 8))
    def test_a_logarithmic_axis_too(self, values: list[float], most: int) -> None:
        axis = Axis.around(values, log=True)
        assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
        assert 2 <= len(axis.ticks(most)) <= max(most, 5)
        assert all(-1e-6 <= axis.at(tick) <= 1 + 1e-6 for tick in axis.ticks(most))

    def test_values_that_cannot_be_drawn_are_passed_over(self) -> None:
        assert Axis.around([math.nan, 2.0, math.inf, 0.0, -1.0], log=True).low == pytest.approx(2.0)
        assert Axis.around([math.nan]) == Axis.around([])

    def test_ticks_of_counts_are_whole(self) -> None:
        assert Axis.around([2], zero=True, whole=True).ticks(6) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "-"), (math.nan, "not finite"), (0.0123, "12.3 ms"), (3.061, "3.06 s"), (65.0, "65.0 s"),
     (754, "12 min 34 s"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_seconds_are_written_as_a_person_would_say_them(value: float | None, words: str) -> None:
    assert show_seconds(value) == words


@pytest.mark.parametrize(("value", "words"), [(None, "-"), (math.inf, "not finite"), (250, "250"), (73082, "73.1 k"),
                                              (1543936, "1.54 M"), (0, "0")])  # fmt: skip
def test_counts_are_written_short(value: float | None, words: str) -> None:
    assert show_short(value) == words
    assert show(None) == "-"


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "rank", "0 ranks"), (1, "epoch", "1 epoch"), (2, "epoch", "2 epochs"), (2, "batch", "2 batches")],
)
def test_one_of_a_thing_is_no_plural(number: int, noun: str, words: str) -> None:
    assert show_count(number, noun) == words
