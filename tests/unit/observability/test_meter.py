"""Readings of a fake machine by stage, attempt, device and rank, and what is said where something cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml
import pytest

from distill.observability.energy.joules import summarize
from distill.observability.energy.meter import Meter, Place, by_host
from tests.metered import A, B, killed, metered, places, zone
from tests.nvml import Board, FakeNvml


@contextmanager
def three_joules_read(nvml: FakeNvml, run_dir: Path, powercap: Path) -> Iterator[tuple[Board, Meter]]:
    """The distill stage on one board, of which 3 J have been read."""
    board = Board(A)
    nvml.boards = [board]
    with metered(run_dir, powercap, places(A)) as meter:
        meter.switch("distill")
        board.millijoules += 3_000
        meter.sample()
        yield board, meter


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
            "energy-a.jsonl: damaged lines are left out",
            "attempt 1 ended without a last reading on a, in stage distill: at most 30 s of it are not counted",
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
        with three_joules_read(nvml, run_dir, powercap) as (board, meter):
            board.millijoules = 100
            meter.sample()
            board.millijoules += 4_000
        found = summarize(run_dir)
        assert found["stages"]["distill"]["joules"] == 7.0
        assert any("GPU 0 (NVIDIA Fake): its counter went backwards" in reason for reason in found["not_measured"])

    def test_a_gpu_lost_in_the_middle_keeps_its_first_part_and_is_read_on_when_it_returns(
        self, nvml: FakeNvml, run_dir: Path, powercap: Path
    ) -> None:
        with three_joules_read(nvml, run_dir, powercap) as (board, meter):
            board.error = pynvml.NVML_ERROR_GPU_IS_LOST
            meter.sample()
            board.error = None
            board.millijoules += 1_000_000  # unknown how much of it was before
            meter.sample()
            board.millijoules += 2_000
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
