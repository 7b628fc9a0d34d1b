"""The page and the tables of a run, from small made-up run directories."""

import base64
import hashlib
import io
import math
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from distill.errors import DistillError
from distill.planning.costs import Costs, Span
from distill.planning.placement.plans import plan_broadcast
from distill.planning.unit import Unit
from distill.reporting import plan_table, result_table, write_report
from distill.reporting.headline import go_on_command
from distill.reporting.run import Run
from distill.reporting.script import SCRIPT
from distill.storage.files import json_line, write_json
from tests.run_directories import (
    EVIL,
    block,
    energy,
    huge,
    metrics,
    network,
    planned,
    run_directory,
    traced,
    write_lines,
)


class Page(HTMLParser):
    """Sections by title, the words of every table cell, and every attribute that could fetch something."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = file.read_text()
        self.sections: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self._heading = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._heading = tag == "h2"
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.sections.append(data)
            self._heading = False

    @property
    def words(self) -> str:
        """What a reader sees, tags taken out."""
        body = self.text.split("</style>")[1].split("<script>")[0]
        return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def drawn(folder: Path) -> Page:
    return Page(write_report(folder))


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
        assert re.search(r"top-1, reconciled +90\.00 % +85\.00 % +-5\.00 points", text)
        assert re.search(r"top-1 +90\.00 % +88\.50 % +-1\.50 points", text)

    def test_the_delivered_state_is_named_and_what_it_was_chosen_by(self) -> None:
        content = metrics(environment={"device": "cpu", "threads": 2})
        top1 = {"assembled": 50.0, "recalibrated": 83.3, "finetuned": None}
        content["student"] |= {
            "top1": 85.0, "top1_finetuned": 10.0, "delivered": "recalibrated",
            "validation": {"images": 6, "standard_error": 12.5, "top1": top1},
        }  # fmt: skip
        text = shown(result_table(content))
        assert re.search(r"top-1, assembled +90\.00 % +40\.00 %", text)
        assert re.search(r"top-1, reconciled, delivered +90\.00 % +85\.00 % +-5\.00 points", text)
        assert re.search(r"top-1, fine-tuned +90\.00 % +10\.00 %", text)
        assert re.search(r"validation top-1, reconciled +- +83\.30 % +\+-12\.5 points", text)
        assert re.search(r"validation top-1, fine-tuned +- +- +", text)
        assert not re.search(r"top-1 +90", text)
        assert re.search(r"latency, batch 1, eager fp32, 2 threads +2\.00 ms +2\.00 ms +1\.000", text)
        content["environment"]["device"] = "NVIDIA H100"
        assert "latency, batch 64, eager fp32 on NVIDIA H100" in shown(result_table(content))

    def test_states_that_did_not_come_about_have_no_row(self) -> None:
        content = metrics(teacher=network(top5=None))
        content["student"] |= {"delivered": "assembled", "top5": None, "validation": {"top1": {"assembled": 50.0}}}
        text = shown(result_table(content))
        assert "reconciled" not in text
        assert "top-5" not in text

    def test_nothing_replaced_has_no_ratio(self) -> None:
        content = metrics(teacher=network(replaced_params=0))
        assert re.search(r"replaced convolutions +0 +800 +-", shown(result_table(content)))

    def test_what_is_missing_or_not_a_number_is_said(self) -> None:
        content = metrics(teacher=network(top5=math.nan))
        del content["student"]["bytes"]
        text = shown(result_table(content))
        assert re.search(r"bytes +4,000 +- +-", text)
        assert re.search(r"top-5 +- +99\.00 % +-", text)


class TestFinishedRun:
    def test_the_page_tells_the_result_first(self, tmp_path: Path) -> None:
        words = drawn(run_directory(tmp_path, metrics())).words
        sentence = (
            "The student reaches 88.50 % top-1 where its teacher has 90.00 %, and answers one image in 2.00 ms "
            "instead of 2.00 ms (the same) and 64 images in 30.00 ms instead of 30.00 ms (the same), in eager PyTorch "
        )
        assert words.index(sentence) < words.index("Teacher against student")
        assert words.index(sentence) < words.index("It has 25.0 % of the parameters and 25.0 % of the FLOPs.")
        assert "Distilling 3 blocks took 12.3 s on 2 ranks." in words
        assert "4.00x smaller" in words

    def test_a_slower_student_is_called_slower_before_its_size_is_told(self, tmp_path: Path) -> None:
        student = metrics()["student"] | {"latency_ms_batch1": 3.0, "latency_ms_batch64": 15.0}
        words = drawn(run_directory(tmp_path, metrics(student=student))).words
        assert words.index("3.00 ms instead of 2.00 ms (1.50x slower)") < words.index("25.0 % of the parameters")
        assert "15.00 ms instead of 30.00 ms (2.00x faster)" in words

    def test_a_run_without_a_step_has_no_speed(self, tmp_path: Path) -> None:
        told = metrics()
        told["distill"]["images_per_second"] = None
        words = drawn(run_directory(tmp_path, told)).words
        assert "no step was taken" in words
        assert "images/s" not in words

    def test_the_page_says_when_where_and_by_what_it_was_made(self, tmp_path: Path) -> None:
        made = {"command": "python -m distill 'data.root=/a b'", "finished_at": "2026-01-02 03:04:05+00:00",
                "started_at": "2026-01-02 03:00:00+00:00", "duration_s": 245.0}  # fmt: skip
        place = {"host": "node7", "device": "cpu", "cpu": "Some CPU", "distill": "0.1.0", "commit": "abc123+"}
        words = drawn(run_directory(tmp_path, metrics(run=made, environment=place))).words
        for fact in (
            "2026-01-02 03:04:05+00:00",
            "took 4 min 05 s",
            "host node7",
            "Some CPU",
            "distill 0.1.0 (abc123+)",
        ):
            assert fact in words[: words.index("Teacher against student")]
        assert "python -m distill &#x27;data.root=/a b&#x27;" in words
        assert "(the same), in eager PyTorch on Some CPU." in words

    def test_every_block_has_its_line_its_curve_and_its_ledger_entry(self, tmp_path: Path) -> None:
        page = drawn(run_directory(tmp_path, metrics()))
        assert page.text.count('<path id="c') == page.text.count('<use href="#c') == 3
        assert page.words.count("0.1234") == 3
        assert "finished; diverged: &lt;script" in page.text

    def test_predictions_stand_beside_measurements(self, tmp_path: Path) -> None:
        page = drawn(planned(run_directory(tmp_path, metrics()), blocks=3, ranks=2))
        assert "makespan 11.0 s 12.3 s 1.12" in page.words
        assert "rank 1, busy 5.00 s 9.25 s 1.85 25.0 %" in page.words
        assert "layer1.0 4.00 17.50 4.38 1.00 3 5" in page.words

    def test_exports_are_listed_with_what_was_found(self, tmp_path: Path) -> None:
        exports = {
            "pt2": {"file": "student.pt2", "status": "ok", "max_abs_difference": 1e-6, "top1_agreement": 100.0,
                    "images": 64},
            "onnx": {"file": None, "status": "failed", "reason": EVIL},
        }  # fmt: skip
        page = drawn(run_directory(tmp_path, metrics(exports=exports)))
        assert "pt2 student.pt2 ok 1e-06 100.00 % 64" in page.words
        assert "onnx - failed - - -" in page.words

    def test_configuration_and_environment_are_there(self, tmp_path: Path) -> None:
        page = drawn(run_directory(tmp_path, metrics()))
        assert "nproc_per_node: 2" in page.words
        assert "fingerprint 0123456789abcdef" in page.words

    def test_fine_tuning_and_the_teacher_have_their_curves(self, tmp_path: Path) -> None:
        epochs = [{"epoch": n, "loss": 1 / n, "seconds": 2.0} for n in (1, 2, 3)]
        run_directory(tmp_path, metrics(finetune={"epochs": epochs, "seconds": 6.0}))
        (tmp_path / "stages").mkdir()
        write_json(tmp_path / "stages" / "teacher.json", {"result": {"epochs": epochs}, "made": {}, "used": {}})
        page = drawn(tmp_path)
        assert 'aria-label="Fine-tuning: loss from 1 to 0.333 in 3 epochs"' in page.text
        assert 'aria-label="Training the teacher: loss from 1 to 0.333 in 3 epochs"' in page.text
        assert "validation accuracy" not in page.text
        assert "teacher 6.00 s" in page.words, "stage seconds without a trace are those of the epochs"

    def test_validation_accuracy_by_epoch_has_its_start_and_the_kept_epoch_marked(self, tmp_path: Path) -> None:
        epochs = [{"epoch": n, "loss": 1.0, "validation_top1": v} for n, v in ((1, 84.0), (2, 86.5), (3, None))]
        content = metrics(finetune={"epochs": epochs, "kept_epoch": 2})
        content["student"]["validation"] = {"top1": {"recalibrated": 80.25}}
        page = drawn(run_directory(tmp_path, content))
        assert 'aria-label="Fine-tuning, validation accuracy: top-1 from 80.25 % to 86.50 %"' in page.text
        assert "80.25 % to 86.50 %; epoch 2 is kept, 86.50 %" in page.words
        assert page.text.count('class="kept"') == 1

    def test_every_section_can_be_linked_to_and_the_page_begins_with_the_links(self, tmp_path: Path) -> None:
        page = drawn(planned(run_directory(tmp_path, metrics()), blocks=3, ranks=2))
        links = [reference[1:] for reference in page.references if reference.startswith("#") and "-" in reference]
        assert {"teacher-against-student", "errors-of-the-blocks"} <= set(links)
        ids = re.findall('<section id="([^"]*)"', page.text)
        assert len(ids) == len(set(ids)) == len(page.sections)
        assert page.text.index("<nav") < page.text.index("<section")


@pytest.mark.parametrize("number", [2, 12, 13, 24, 48])
def test_no_two_blocks_look_alike(tmp_path: Path, number: int) -> None:
    blocks = [block(n, f"layer{n}") for n in range(number)]
    page = drawn(run_directory(tmp_path, metrics(blocks=blocks)))
    looks = re.findall('<path id="c[0-9]+" class="([^"]*)"', page.text)
    assert len(set(looks)) == number
    assert looks == re.findall('class="sample"[^>]*><path class="([^"]*)"', page.text), "the legend shows each as it is"
    hues: dict[str, list[int]] = {}  # of the lines of one pattern, in percent of the way from first to last
    for look in looks:
        _, hue, *more = look.split()
        hues.setdefault(next((word for word in more if word != "shaded"), "solid"), []).append(int(hue[1:]))
    assert min(b - a for same in hues.values() for a, b in pairwise(same)) >= 8


class TestSafety:
    def test_names_are_escaped_and_no_script_comes_in_by_them(self, tmp_path: Path) -> None:
        content = metrics(teacher=network(name=EVIL), data={"name": EVIL}, energy=energy() | {"not_measured": [EVIL]})
        run_directory(tmp_path, content)
        (tmp_path / "resolved.yaml").write_text(f"run: {EVIL}")
        traced(tmp_path, ranks=2, steps=20)
        page = drawn(tmp_path)
        assert page.tags.count("script") == 1
        assert page.text.lower().count("<script") == 1
        assert page.text.count("&lt;script&gt;") >= 8

    def test_page_asks_nothing_of_the_network(self, tmp_path: Path) -> None:
        page = drawn(traced(planned(run_directory(tmp_path, metrics()), blocks=3, ranks=2), ranks=2, steps=20))
        assert "http" not in page.text.replace("http-equiv=", "")
        assert "url(" not in page.text
        assert " style=" not in page.text, "the policy has no place for them"
        assert "@import" not in page.text
        assert all(reference.startswith(("#", "data:,")) for reference in page.references)

    def test_the_policy_allows_the_script_and_the_styles_that_are_there_and_nothing_else(self, tmp_path: Path) -> None:
        page = drawn(run_directory(tmp_path, metrics()))
        policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', page.text)
        assert policy is not None
        allowed = dict(part.split(" ", 1) for part in policy[1].split("; "))
        for name, directive in (("script", "script-src"), ("style", "style-src")):
            (content,) = re.findall(f"<{name}>(.*?)</{name}>", page.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert allowed.pop(directive) == f"'sha256-{digest}'"
        assert allowed.pop("img-src") == "data:"
        assert set(allowed.values()) == {"'none'"}
        assert "default-src" in allowed

    def test_the_script_is_short_and_writes_no_markup(self) -> None:
        assert len(SCRIPT.strip().splitlines()) <= 80
        assert not re.search("innerHTML|insertAdjacent|document.write|eval|fetch|import", SCRIPT)

    def test_page_of_a_huge_run_stays_under_a_megabyte(self, tmp_path: Path) -> None:
        page = drawn(huge(tmp_path))
        assert len(page.text.encode()) < 1_000_000
        assert page.text.count('<path id="c') == 200
        assert "rank 63" in page.words


class TestPoorRecords:
    def test_a_run_without_readings_has_no_curves_but_a_page(self, tmp_path: Path) -> None:
        page = drawn(run_directory(tmp_path, metrics(), readings=0))
        assert "Errors of the blocks" not in page.sections
        assert "Ledger" in page.sections

    def test_a_block_without_readings_is_named(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        (tmp_path / "metrics" / "rank1.jsonl").unlink()
        assert "No readings of: layer2.0" in drawn(tmp_path).words

    def test_errors_that_are_not_numbers_break_the_curve_and_reach_no_drawing(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        with (tmp_path / "metrics" / "rank0.jsonl").open("a") as file:
            for step, bad in enumerate((math.nan, math.inf, -math.inf, 0.0, None, "x"), start=500):
                file.write(json_line({"block": 0, "step": step, "relative_error": bad}, "rank0.jsonl"))
        page = drawn(tmp_path)
        assert not re.search(r'[ "](nan|inf|-inf)', page.text.split("</style>")[1].split("<script>")[0])
        assert page.text.count('<path id="c') == 3

    def test_a_half_written_or_strange_line_does_not_cost_the_report(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        with (tmp_path / "metrics" / "rank1.jsonl").open("a") as file:
            file.write('{"step": 3}\n[1, 2]\n{"block": 1, "st')
        assert drawn(tmp_path).text.count('<path id="c') == 3

    @pytest.mark.parametrize("name", ["plan.json", "costs.json", "ledger.jsonl", "generation.json", "metrics.json"])
    def test_a_damaged_file_costs_only_what_it_told(self, tmp_path: Path, name: str) -> None:
        planned(run_directory(tmp_path, metrics()), blocks=3, ranks=2)
        (tmp_path / name).write_text('{"half')
        assert "Errors of the blocks" in drawn(tmp_path).sections

    @pytest.mark.parametrize("key", ["distill", "blocks", "environment", "data", "seed"])
    def test_metrics_of_an_older_version_lack_a_section_and_still_draw(self, tmp_path: Path, key: str) -> None:
        content = metrics()
        run_directory(tmp_path, content)
        del content[key]
        write_json(tmp_path / "metrics.json", content)
        assert "Teacher against student" in drawn(tmp_path).sections

    def test_steps_that_were_done_again_count_as_they_were_done_last(self, tmp_path: Path) -> None:
        run_directory(tmp_path, None)
        lines = [{"block": 0, "step": s, "relative_error": e, "generation": g} for s, e, g in
                 ((20, 0.5, 2), (20, 0.9, 1), (40, 0.8, 1), (40, 0.25, 2))]  # fmt: skip
        (tmp_path / "metrics" / "rank0.jsonl").unlink(missing_ok=True)
        write_lines(tmp_path / "metrics" / "rank0.jsonl", lines)
        assert "block 0 0.5 to 0.25" in drawn(tmp_path).words

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DistillError, match="no run is there; expected a run directory"):
            write_report(tmp_path)


class TestUnfinishedRun:
    def begun(self, folder: Path, log: str = "") -> Path:
        planned(run_directory(folder, None), blocks=3, ranks=2)
        write_lines(folder / "ledger.jsonl", [block(0, "layer0.0")])
        (folder / "stages").mkdir()
        write_json(folder / "stages" / "teacher.json", {"result": {}, "made": {}, "used": {}})
        (folder / "logs").mkdir()
        (folder / "logs" / "rank1.log").write_text(log)
        begin = "2030-01-01 10:00:00,000 [rank 0] INFO distill: run directory: /x (attempt 2)\n"
        (folder / "logs" / "rank0.log").write_text(begin)
        return folder

    def test_it_tells_how_far_every_block_and_stage_is(self, tmp_path: Path) -> None:
        page = drawn(self.begun(tmp_path))
        assert "unfinished: distill" in page.words
        assert "1 of 3 blocks finished. Complete stages: teacher, first_weights, plan." in page.words
        assert re.search(r"layer0\.0 0 finished 200 of 200", page.words)
        assert re.search(r"layer2\.0 0 training 100 of 200", page.words)
        assert "What stopped it" not in page.sections

    def test_its_last_error_and_the_command_that_goes_on_are_shown(self, tmp_path: Path) -> None:
        log = "2030-01-01 10:00:01,000 [rank 1] ERROR distill: no activation <5> from rank 0\nTraceback\n"
        page = drawn(self.begun(tmp_path, log))
        assert "failed in stage distill" in page.words
        assert "no activation &lt;5&gt; from rank 0 Traceback" in page.words
        assert f"python -m distill run={tmp_path.relative_to(tmp_path.parents[2])} " in page.words

    @pytest.mark.parametrize(
        ("given", "cwd", "run"),
        [
            ("null", "", "outputs/it's/0a1b"),
            ("outputs/it's/0a1b", "", "outputs/it's/0a1b"),
            ("0a1b", "outputs/it's", "0a1b"),
            (".", "outputs/it's/0a1b", "."),
            ("../0a1b", None, None),
            ("/elsewhere/0a1b", None, None),
        ],
    )
    def test_going_on_starts_where_the_run_was_started(
        self, tmp_path: Path, given: str, cwd: str | None, run: str | None
    ) -> None:
        folder = self.begun(tmp_path / "outputs" / "it's" / "0a1b")
        record = f'stage: distill\nlaunch: {{nproc_per_node: 2}}\nrun: {{dir: "{given}"}}\n'.replace('"null"', "null")
        (folder / "resolved.yaml").write_text(record)
        *before, command = go_on_command(Run(folder)).splitlines()
        assert [shlex.split(line) for line in before] == ([] if cwd is None else [["cd", str(tmp_path / cwd)]])
        words = ["python", "-m", "distill", f"run={run or folder}", "stage=distill", "launch.nproc_per_node=2"]
        assert shlex.split(command) == words

    def test_an_error_of_an_earlier_attempt_is_not_what_stopped_this_one(self, tmp_path: Path) -> None:
        log = "2030-01-01 09:59:59,000 [rank 1] ERROR distill: no activation\n"
        page = drawn(self.begun(tmp_path, log))
        assert "What stopped it" not in page.sections
        assert "unfinished: distill" in page.words

    def test_a_run_that_only_claimed_its_directory_has_a_page(self, tmp_path: Path) -> None:
        (tmp_path / "identity.json").write_text("{}")
        page = drawn(tmp_path)
        assert "unfinished: teacher" in page.words
        assert "Go on" in page.sections


class TestTimeLine:
    def test_totals_count_all_steps_and_what_is_left_is_idle(self, tmp_path: Path) -> None:
        page = drawn(traced(run_directory(tmp_path, metrics()), ranks=2, steps=100))
        # 1.05 s: 0.9 of training, 0.1 of waiting, 0.05 of nothing
        assert "rank 1 - 85.7 % 9.5 % 4.8 %" in page.words
        assert 'aria-label="rank 0: teacher 0 %, student 86 %, wait 10 %, idle 5 %"' in page.text
        assert "not recorded" not in page.words

    def test_spans_of_the_first_steps_say_what_they_are(self, tmp_path: Path) -> None:
        page = drawn(traced(run_directory(tmp_path, metrics()), ranks=2, steps=100))
        assert "<title>student layer1.0, step 0, 3.0 ms</title>" in page.text
        assert "<title>teacher layer0.0, step 0, 3.0 ms</title>" in page.text

    def test_steps_that_a_sample_left_out_are_not_recorded_and_not_idle(self, tmp_path: Path) -> None:
        page = drawn(traced(run_directory(tmp_path, metrics()), ranks=2, steps=2000, kept_every=64))
        assert "not recorded" in page.words
        assert "The first 8 steps" in page.words
        assert "The last 8 steps" in page.words
        assert "the drawings lack 3,906 steps" in page.words
        whole = page.text.split("The whole stage")[1].split("</figure>")[0]
        idle, wait = (re.search(rf'class="area {kind}" d="([^"]*)"', whole) for kind in ("idle", "wait"))
        assert idle is not None
        assert wait is not None
        assert idle[1].startswith("M0 100H0V0H"), "idle is the ground that the others are drawn on"
        assert wait[1].startswith("M0 100H0V0H"), "and all of it is covered, also where most steps were left out"

    def test_only_the_latest_attempt_is_drawn(self, tmp_path: Path) -> None:
        run_directory(tmp_path, metrics())
        traced(tmp_path, ranks=4, steps=50, generation=1)
        page = drawn(traced(tmp_path, ranks=1, steps=50, generation=2))
        assert "share of time by kind of 1 rank over" in page.text

    def test_a_rank_whose_trace_is_damaged_is_left_out(self, tmp_path: Path) -> None:
        traced(run_directory(tmp_path, metrics()), ranks=2, steps=20)
        (tmp_path / "traces" / "rank1.1.json").write_text('{"rank": 1')
        assert "share of time by kind of 1 rank over" in drawn(tmp_path).text


class TestEnergy:
    def test_what_was_not_measured_is_said_and_never_zero(self, tmp_path: Path) -> None:
        assert "not measured : this run kept no readings of energy" in drawn(run_directory(tmp_path, metrics())).words
        reason = {"devices": [], "stages": {}, "not_measured": ["gpu on node: no driver"]}
        page = drawn(run_directory(tmp_path, metrics(energy=reason)))
        assert "not measured : gpu on node: no driver" in page.words
        assert "0 J" not in page.words

    def test_joules_by_stage_rank_image_and_device_with_idle_devices_apart(self, tmp_path: Path) -> None:
        words = drawn(run_directory(tmp_path, metrics(energy=energy()))).words
        assert "1.5 kJ in the measured stages (distill), 100 mJ an image of the distill stage." in words
        assert "a reading was lost" in words
        assert "distill 10.0 1.5 kJ 150 1.5 kJ not measured 300 J" in words
        assert "rank 1 not measured" in words
        assert "GPU 1 Board node none: idle 300 J" in words
        assert "Not measured : cpu on node: no RAPL counter is readable" in words


class Costly:
    """Costs by block, as the report wants them."""

    def __init__(self, teacher: list[float], student: list[float]) -> None:
        self.teacher, self.student = teacher, student


class Sized:
    """Sizes by block, as the report wants them."""

    def __init__(self, params: list[float | None], flops: list[float | None]) -> None:
        self.params, self.flops = params, flops


def test_names_of_blocks_are_whole_on_80_columns() -> None:
    names = ["features.2", "features.28", "layer4.2.conv2"]
    plan = plan_broadcast(Costs((0.1,) * 3, (0.9,) * 3, (10,) * 4), [Span(block, 0, 46_890) for block in range(3)], 2)
    costs, sizes = Costly([0.1213] * 3, [1.0123] * 3), Sized([2_360_000] * 3, [231e6] * 3)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan_table(plan, names, (), sizes=(sizes, sizes), costs=costs, start={1: 0.0123}))
    rows = console.export_text().splitlines()[3:6]
    assert [row.split()[0] for row in rows] == names
    figures = ["46890", "2.36", "M", "2.36", "M", "231", "M", "231", "M", "121.3", "1012.3"]
    assert [row.split()[2:] for row in rows] == [[*figures, error] for error in ("-", "0.012", "-")]


def test_plan_table_shows_what_is_trained_what_it_saves_and_what_it_costs() -> None:
    plan = plan_broadcast(
        Costs((0.001, 0.001, 0.001), (0.0, 0.004, 0.004), (10,) * 4), [Span(1, 0, 9), Span(2, 5, 9)], 2
    )
    teacher, student = Sized([100, 9000, 9000], [1e6, 2e6, 2e6]), Sized([None, 1000, 2000], [None, 3e5, 4e5])
    costs = Costly([0.001] * 3, [0.0, 0.004, 0.005])
    text = shown(
        plan_table(plan, ["stem", "layer1", "layer2"], (), sizes=(teacher, student), costs=costs, start={1: 0.2, 2: 3})
    )
    assert "plan: broadcast on 2 ranks" in text
    assert "of one image in use, 2 per multiply-add" in " ".join(text.split())
    assert re.search(r"stem +- +- +100 +- +1.00 M +- +1\.0 +- +-", text)
    assert re.search(r"layer1 +[01] +9 +9.00 k +1.00 k +2.00 M +300 k +1\.0 +4\.0 +0\.2", text)
    assert re.search(r"layer2 +[01] +5-9 +9.00 k +2.00 k +2.00 M +400 k +1\.0 +5\.0 +3", text)
    assert re.search(r"all blocks +18.1 k +3.10 k +5.00 M +1.70 M +3\.0 +9\.0", text), "the stem stays the teacher's"
    units = [*map(Unit.of_block, (1, 2), ("layer1", "layer2")), Unit(3, "layer1..layer2:one", 1, 3, "one")]
    more = Costly(costs.teacher, [*costs.student, 0.0079])
    sized = Sized([*student.params, 500], [*student.flops, 1e5])
    both = shown(plan_table(plan, ["stem", "layer1", "layer2"], units, sizes=(teacher, sized), costs=more, start={}))
    assert re.search(r"layer1\.\.layer2:one +- +- +500 +100 k +7\.9", both), "the teacher's figures are its blocks'"
    assert re.search(r"all blocks +18.1 k +3.10 k +5.00 M +1.70 M +3\.0 +9\.0", both), "other units are no part of it"
    between = plan_table(
        plan, ["a", "b", "c"], (), sizes=(Sized([None, 9, 9], [1, 2, 2]), student), costs=costs, start={}
    )
    assert re.search(r"all blocks +- +- +5", shown(between))
