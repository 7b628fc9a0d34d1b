"""Counters of a fake NVML and a fake powercap tree: which are found, how they wrap, and why others are not there."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from distill.observability.energy.counters import CounterError, open_counters
from tests.metered import WRAP, A, B, zone
from tests.nvml import Board, FakeNvml


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
