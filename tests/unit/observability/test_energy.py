"""What a run has spent, from its readings: sums, damaged lines, joules per image, and the commands of the page."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distill.observability.energy.counters import Counters
from distill.observability.energy.joules import describe, job_joules, joules_per_image, summarize
from distill.observability.energy.meter import Meter
from distill.storage.files import json_line
from tests.documents import fenced
from tests.metered import A, B, metered, places, zone
from tests.nvml import Board, FakeNvml


class TestSummary:
    def test_a_run_without_readings_is_not_measured(self, tmp_path: Path) -> None:
        found = summarize(tmp_path)
        assert (found["devices"], found["stages"]) == ([], {})
        assert len(found["not_measured"]) == 1
        assert job_joules(found) is None
        assert describe(found).startswith("energy: not measured (")

    def test_damaged_lines_are_passed_over(self, nvml: FakeNvml, run_dir: Path, powercap: Path) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 5_000
        whole = summarize(run_dir)
        file = run_dir / "metrics" / "energy-a.jsonl"
        line = json.loads(file.read_text().splitlines()[-1])
        damaged = ["{", "[]", "7", "{}", '{"generation": 1}', "\x00\x01"]
        damaged.append(json.dumps(line | {"joules": {"gpu0": 9.0}}))  # not what its checksum says
        strange = [{"joules": {"gpu0": -1.0}}, {"joules": {"gpu0": "x"}}, {"joules": {"gpu7": 1.0}}]
        with file.open("a") as stream:
            stream.write("\n".join(damaged) + "\n")
            stream.writelines(json_line(line | change, file.name) for change in [*strange, {"seconds": float("nan")}])
        assert summarize(run_dir) == whole | {"notes": ["energy-a.jsonl: damaged lines are left out"]}

    def test_readings_whose_list_of_devices_is_damaged_are_told(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 5_000
        file = run_dir / "metrics" / "energy-a.jsonl"
        file.write_text(file.read_text()[5:])
        found = summarize(run_dir)
        assert found["not_measured"] == ["attempt 1 in energy-a.jsonl: its list of devices is damaged"]
        assert found["stages"] == {}

    def test_joules_per_image_are_of_the_distill_stage_and_of_the_job(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A), Board(B)]
        with metered(run_dir, powercap, places(A)) as meter:
            for stage, millijoules in (("teacher", 1_000), ("distill", 4_000)):
                meter.switch(stage)
                nvml.boards[0].millijoules += millijoules
                nvml.boards[1].millijoules += 30_000
        found = summarize(run_dir)
        assert joules_per_image(found, 8) == {"distill": 0.5, "job": 0.625}
        assert joules_per_image(found, 0) == {"distill": None, "job": None}
        line = describe(found)
        assert line.startswith(
            "energy: teacher 1.0 J, distill 4.0 J, together 5.0 J; idle devices, not included: 60.0 J"
        )
        assert "; not measured: cpu on a: no RAPL package" in line

    @pytest.mark.parametrize("stage", [None, 7, [], {}, {"joules": None}, {"joules": "many"}, {"joules": float("nan")}])
    def test_what_a_damaged_summary_lacks_is_not_measured(self, stage: Any) -> None:
        summary = {"stages": {"teacher": {"joules": 2.0}, "distill": stage}}
        assert job_joules(summary) == 2.0
        assert joules_per_image(summary, 4) == {"distill": None, "job": 0.5}

    @pytest.mark.parametrize("summary", [{}, {"stages": None}, {"stages": {}}])
    def test_a_summary_without_stages_is_not_measured(self, summary: dict[str, Any]) -> None:
        assert job_joules(summary) is None
        assert joules_per_image(summary, 4) == {"distill": None, "job": None}
        assert joules_per_image(summary, None) == {"distill": None, "job": None}

    def test_counters_with_nothing_found_give_the_seconds_and_the_reasons(self, run_dir: Path) -> None:
        nothing = Counters((), (("gpu", "no driver"), ("cpu", "no RAPL")))
        with Meter(run_dir, host="x/y", places=places(None), counters=nothing, generation=1) as meter:
            meter.switch("distill")
        found = summarize(run_dir)
        assert found["not_measured"] == ["gpu on x/y: no driver", "cpu on x/y: no RAPL"]
        assert found["stages"]["distill"]["seconds"] > 0
        assert {value for key, value in found["stages"]["distill"].items() if key.endswith("joules")} == {None}
        assert describe(found) == "energy: not measured (gpu on x/y: no driver; cpu on x/y: no RAPL)"


class TestDocumentation:
    def test_the_program_of_the_page_prints_every_device_and_stage(
        self,
        nvml: FakeNvml,
        run_dir: Path,
        powercap: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        nvml.boards = [Board(A), Board(B)]
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 25_600
            nvml.boards[1].millijoules += 1_000
        monkeypatch.chdir(run_dir.parent)
        (program,) = fenced("docs/energy.md", "python")
        exec(compile(program, "docs/energy.md", "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "a gpu NVIDIA Fake ranks [0] {'distill': 25.6}"
        assert printed[1] == "a gpu NVIDIA Fake idle {'distill': 1.0}"
        assert printed[2].endswith("s 25.6 J by rank: {'0': 25.6}")
        assert printed[3] == "25.6 {'distill': 0.001, 'job': 0.001}"
        assert len(printed) == 5

    def test_the_command_that_permits_rapl_makes_its_counters_readable_for_all(self, powercap: Path) -> None:
        counters = [zone(powercap, "0"), zone(powercap, "1", "package-1")]
        for counter in counters:
            counter.chmod(0o400)
        (command,) = fenced("docs/energy.md", "sh")
        subprocess.run(command.replace("/sys/class/powercap", str(powercap)), shell=True, check=True, timeout=10)
        assert [counter.stat().st_mode & 0o777 for counter in counters] == [0o444, 0o444]
