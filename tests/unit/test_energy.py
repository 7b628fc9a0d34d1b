"""Energy against a fake NVML and a fake powercap tree: what is counted, for whom, and what is said where it is not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import pytest

from distill.counters import CounterError, Counters, open_counters
from distill.energy import describe, job_joules, joules_per_image, summarize
from distill.meter import Meter, Place, by_host
from tests.documents import fenced
from tests.nvml import Board, FakeNvml

A, B = "aaaa-0001", "bbbb-0002"  # UUIDs of two boards, as torch writes them
WRAP = 65_532_610_987  # microjoules: max_energy_range_uj of an AMD package


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml().install(monkeypatch)


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    return tmp_path / "powercap"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    return tmp_path / "run"


def zone(powercap: Path, number: str = "0", name: str = "package-0", *, start: int = 0) -> Path:
    """Make a RAPL zone; return the file of its counter."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
    (folder / "energy_uj").write_text(f"{start}\n")
    return folder / "energy_uj"


def places(*uuids: str | None, host: str = "a") -> list[Place]:
    """Ranks 0, 1, ... of one host on these devices."""
    return [Place(rank, host, f"machine of {host}", uuid) for rank, uuid in enumerate(uuids)]


@contextmanager
def metered(
    run_dir: Path, powercap: Path, where: list[Place], *, generation: int = 1, host: str = "a", every_s: float = 3600.0
) -> Iterator[Meter]:
    with (
        open_counters(powercap) as counters,
        Meter(run_dir, host=host, places=where, counters=counters, generation=generation, every_s=every_s) as meter,
    ):
        yield meter


def killed(
    run_dir: Path, powercap: Path, where: list[Place], work: Callable[[Meter], None], *, generation: int
) -> None:
    """An attempt that is killed: its meter is never closed."""
    with open_counters(powercap) as counters:
        work(Meter(run_dir, host="a", places=where, counters=counters, generation=generation))


class TestCounters:
    def test_every_board_is_found_with_torchs_form_of_its_uuid(self, nvml: FakeNvml, powercap: Path) -> None:
        nvml.boards = [Board(A.upper(), 5), Board(B, 7, knows_mig=False)]
        with open_counters(powercap) as counters:
            gpus = [(c.index, c.uuid, c.read() * c.joules_per_count) for c in counters.found]
        assert gpus == [(0, A, 0.005), (1, B, 0.007)]

    def test_nvml_is_shut_down_also_after_an_error(self, nvml: FakeNvml, powercap: Path) -> None:
        seen = []

        def fail() -> None:
            with open_counters(powercap):
                seen.append(nvml.running)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert (seen, nvml.running) == ([True], False)

    @pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
    def test_without_a_driver_there_is_a_reason_and_no_gpu(self, nvml: FakeNvml, powercap: Path, code: int) -> None:
        nvml.refuses = code
        with open_counters(powercap) as counters:
            assert counters.found == ()
            assert ("gpu", f"NVML: {pynvml.NVMLError(code)}") in counters.missing

    def test_a_board_that_cannot_be_opened_or_is_divided_does_not_hide_the_others(
        self, nvml: FakeNvml, powercap: Path
    ) -> None:
        nvml.boards = [Board(A, broken=pynvml.NVML_ERROR_NO_PERMISSION), Board("cccc", mig=True), Board(B)]
        with open_counters(powercap) as counters:
            assert [counter.index for counter in counters.found] == [2]
            reasons = [reason for kind, reason in counters.missing if kind == "gpu"]
        assert reasons[0] == "GPU 0: Insufficient Permissions"
        assert "MIG is on" in reasons[1]

    def test_packages_alone_are_counted_not_what_lies_in_or_around_them(self, nvml: FakeNvml, powercap: Path) -> None:
        zone(powercap, "0", "package-0")
        zone(powercap, "0:0", "core")
        zone(powercap, "1", "psys")
        zone(powercap, "10", "package-10")
        zone(powercap, "2", "package-1")
        with open_counters(powercap) as counters:
            assert [(c.kind, c.index, c.name) for c in counters.found] == [
                ("cpu", 0, "package-0"),
                ("cpu", 2, "package-1"),
                ("cpu", 10, "package-10"),
            ]

    def test_a_host_without_rapl_says_so(self, nvml: FakeNvml, powercap: Path) -> None:
        with open_counters(powercap) as counters:
            (reason,) = [reason for kind, reason in counters.missing if kind == "cpu"]
        assert f"no RAPL package in {powercap}" in reason

    def test_a_package_counter_may_wrap_once(self, nvml: FakeNvml, powercap: Path) -> None:
        zone(powercap)
        with open_counters(powercap) as counters:
            assert counters.found[0].joules(WRAP - 3_000_000, 2_000_000) == pytest.approx(5.0)

    def test_a_reset_is_an_error_and_no_wrap(self, nvml: FakeNvml, powercap: Path) -> None:
        nvml.boards = [Board(A)]
        zone(powercap)
        with open_counters(powercap) as counters:
            for counter in counters.found:
                with pytest.raises(CounterError, match="went backwards"):
                    counter.joules(4_000_000, 1_000_000)

    def test_a_package_that_hides_its_range_cannot_wrap(self, nvml: FakeNvml, powercap: Path) -> None:
        (zone(powercap).parent / "max_energy_range_uj").unlink()
        with open_counters(powercap) as counters, pytest.raises(CounterError):
            counters.found[0].joules(WRAP - 3_000_000, 2_000_000)


class TestMeter:
    def test_each_stage_has_the_joules_spent_within_it_and_nothing_between_counts(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        counter = zone(powercap)
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("teacher")
            nvml.boards[0].millijoules += 2_000
            counter.write_text("3000000")
            meter.switch(None)
            nvml.boards[0].millijoules += 500_000
            meter.switch("distill")
            nvml.boards[0].millijoules += 7_000
            meter.sample()
            nvml.boards[0].millijoules += 1_000
            counter.write_text("4000000")
        stages = summarize(run_dir)["stages"]
        assert {name: (s["gpu_joules"], s["cpu_joules"], s["joules"]) for name, s in stages.items()} == {
            "teacher": (2.0, 3.0, 5.0),
            "distill": (8.0, 1.0, 9.0),
        }
        assert stages["distill"]["ranks"] == {"0": 8.0}, "the package belongs to no rank"
        assert not nvml.running

    def test_a_thread_reads_in_the_middle_of_a_stage(self, nvml: FakeNvml, run_dir: Path, powercap: Path) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A), every_s=0.01) as meter:
            meter.switch("distill")
            while nvml.boards[0].reads < 5:
                nvml.boards[0].millijoules += 1
        lines = [json.loads(line) for line in (run_dir / "metrics" / "energy-a.jsonl").read_text().splitlines()]
        events = [line["event"] for line in lines[1:]]
        assert events[0] == "begin"
        assert events[-1] == "end"
        assert events.count("sample") >= 3

    def test_a_killed_attempt_keeps_what_it_had_read(self, nvml: FakeNvml, run_dir: Path, powercap: Path) -> None:
        nvml.boards = [Board(A)]

        def work(meter: Meter) -> None:
            meter.switch("distill")
            nvml.boards[0].millijoules += 10_000
            meter.sample()
            nvml.boards[0].millijoules += 99_000  # after the last reading

        killed(run_dir, powercap, places(A), work, generation=1)
        before = summarize(run_dir)
        assert before["stages"]["distill"]["joules"] == 10.0, "an unfinished run has its numbers so far"
        assert before["notes"] == [], "it may still be running"
        with (run_dir / "metrics" / "energy-a.jsonl").open("a") as file:
            file.write('{"generation": 1, "stage": "dist')  # killed while it wrote
        with metered(run_dir, powercap, places(A), generation=2) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 4_000
        found = summarize(run_dir)
        assert found["stages"]["distill"]["joules"] == 14.0
        assert found["devices"][0]["joules"] == {"distill": 14.0}
        assert found["notes"] == [
            "attempt 1 ended without a last reading on a, in stage distill: at most 30 s of it are not counted"
        ]

    def test_two_ranks_on_one_gpu_split_it_and_the_summary_says_so(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A, A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 6_000
        found = summarize(run_dir)
        assert found["devices"][0]["ranks"] == [0, 1]
        assert found["stages"]["distill"]["ranks"] == {"0": 3.0, "1": 3.0}
        assert found["stages"]["distill"]["gpu_joules"] == 6.0
        assert found["notes"] == ["GPU 0 (NVIDIA Fake) of a is shared by ranks 0, 1: split equally"]

    def test_a_gpu_without_a_rank_is_listed_apart_and_charged_to_nobody(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A), Board(B)]
        with metered(run_dir, powercap, places(B)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 50_000
            nvml.boards[1].millijoules += 8_000
        found = summarize(run_dir)
        stage = found["stages"]["distill"]
        assert (stage["joules"], stage["idle_devices_joules"]) == (8.0, 50.0)
        assert stage["ranks"] == {"0": 8.0}
        assert [(d["index"], d["ranks"], d["joules"]) for d in found["devices"]] == [
            (0, [], {"distill": 50.0}),
            (1, [0], {"distill": 8.0}),
        ]

    def test_a_gpu_that_only_one_attempt_used_is_idle_in_the_other(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A), Board(B)]
        for generation, where in ((1, places(A, B)), (2, places(A))):
            with metered(run_dir, powercap, where, generation=generation) as meter:
                meter.switch("distill")
                nvml.boards[0].millijoules += 1_000
                nvml.boards[1].millijoules += 10_000
        stage = summarize(run_dir)["stages"]["distill"]
        assert stage["ranks"] == {"0": 2.0, "1": 10.0}
        assert (stage["gpu_joules"], stage["idle_devices_joules"]) == (12.0, 10.0)

    def test_hosts_are_added_up_and_their_seconds_are_not(self, nvml: FakeNvml, run_dir: Path, powercap: Path) -> None:
        counter = zone(powercap)
        for rank, host in enumerate(("a", "b")):
            where = [Place(rank, host, host, None)]
            with metered(run_dir, powercap, where, host=host) as meter:
                meter.switch("distill")
                counter.write_text(str(int(counter.read_text()) + 5_000_000))
        found = summarize(run_dir)
        assert [(d["host"], d["kind"], d["ranks"]) for d in found["devices"]] == [("a", "cpu", [0]), ("b", "cpu", [1])]
        assert found["stages"]["distill"]["cpu_joules"] == 10.0
        longest = max(
            json.loads(file.read_text().splitlines()[-1])["seconds"]
            for file in (run_dir / "metrics").glob("energy-*.jsonl")
        )
        assert found["stages"]["distill"]["seconds"] == longest

    def test_a_reset_counter_leaves_its_increment_out_and_says_so(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 3_000
            meter.sample()
            nvml.boards[0].millijoules = 100
            meter.sample()
            nvml.boards[0].millijoules += 4_000
        found = summarize(run_dir)
        assert found["stages"]["distill"]["joules"] == 7.0
        assert any("GPU 0 (NVIDIA Fake): its counter went backwards" in reason for reason in found["not_measured"])

    def test_a_gpu_lost_in_the_middle_keeps_its_first_part_and_is_read_on_when_it_returns(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 3_000
            meter.sample()
            nvml.boards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
            meter.sample()
            nvml.boards[0].error = None
            nvml.boards[0].millijoules += 1_000_000  # unknown how much of it was before
            meter.sample()
            nvml.boards[0].millijoules += 2_000
        found = summarize(run_dir)
        assert found["stages"]["distill"]["joules"] == 5.0
        reason = "gpu on a: GPU 0 (NVIDIA Fake): NVML: GPU is lost (in stage distill)"
        assert reason in found["not_measured"]

    @pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION])
    def test_a_board_without_a_readable_counter_is_listed_without_joules(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path, code: int
    ) -> None:
        nvml.boards = [Board(A, error=code)]
        counter = zone(powercap)
        with metered(run_dir, powercap, places(A)) as meter:
            meter.switch("distill")
            counter.write_text("2000000")
        found = summarize(run_dir)
        stage = found["stages"]["distill"]
        assert (stage["gpu_joules"], stage["joules"], stage["ranks"]) == (None, 2.0, {})
        assert [d["joules"] for d in found["devices"]] == [{}, {"distill": 2.0}]
        assert found["not_measured"] == [f"gpu on a: GPU 0 (NVIDIA Fake): NVML: {pynvml.NVMLError(code)}"]

    def test_a_package_that_is_not_readable_says_what_allows_it(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counter = zone(powercap)
        read_text = Path.read_text

        def refuse(path: Path, *arguments: str, **options: str) -> str:  # root may read whatever the mode says
            if path == counter:
                raise PermissionError(13, os.strerror(13), str(path))
            return read_text(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", refuse)
            with metered(run_dir, powercap, places(None)) as meter:
                meter.switch("distill")
        found = summarize(run_dir)
        assert found["stages"]["distill"]["cpu_joules"] is None
        assert found["stages"]["distill"]["joules"] is None
        reason = next(reason for reason in found["not_measured"] if reason.startswith("cpu on a"))
        assert f"{counter} not readable (permission denied)" in reason
        assert f"chmod a+r {counter}" in reason

    def test_a_rank_whose_device_nvml_does_not_list_is_named(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        nvml.boards = [Board(A)]
        zone(powercap)
        with metered(run_dir, powercap, places(A, "dddd")) as meter:
            meter.switch("distill")
            nvml.boards[0].millijoules += 1_000
        found = summarize(run_dir)
        assert found["stages"]["distill"]["ranks"] == {"0": 1.0}
        assert any("the device of rank 1 (dddd)" in reason for reason in found["not_measured"])

    def test_a_counter_that_does_not_move_is_not_measured_and_not_zero(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        zone(powercap)
        with metered(run_dir, powercap, places(None)) as meter:
            meter.switch("distill")
        found = summarize(run_dir)
        assert found["stages"]["distill"]["joules"] is None
        assert found["devices"][0]["joules"] == {}
        assert "cpu on a: package-0: its counter did not move (in stage distill)" in found["not_measured"]

    def test_a_full_disk_does_not_stop_the_job(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (run_dir / "metrics").rmdir()
        with metered(run_dir, powercap, places(None)) as meter:
            meter.switch("distill")
        assert "a reading is lost" in caplog.text


class TestHosts:
    def test_the_first_rank_of_each_machine_leads_its_group(self) -> None:
        found = by_host([Place(2, "b", "m2", None), Place(1, "a", "m1", None), Place(0, "a", "m1", None)])
        assert {host: [place.rank for place in group] for host, group in found.items()} == {"a": [0, 1], "b": [2]}

    def test_two_names_of_one_machine_are_one_host(self) -> None:
        assert list(by_host([Place(0, "c1", "m", None), Place(1, "c2", "m", None)])) == ["c1"]

    def test_two_machines_of_one_name_are_told_apart(self) -> None:
        found = by_host([Place(0, "localhost", "0123456789", None), Place(1, "localhost", "abcdefghij", None)])
        assert list(found) == ["localhost-01234567", "localhost-abcdefgh"]


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
        damaged += [json.dumps(line | change) for change in ({"joules": {"gpu0": -1.0}}, {"joules": {"gpu0": "x"}})]
        damaged += [json.dumps(line | {"joules": {"gpu7": 1.0}}), json.dumps(line | {"seconds": float("nan")})]
        with file.open("a") as stream:
            stream.write("\n".join(damaged) + "\n")
        assert summarize(run_dir) == whole

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
