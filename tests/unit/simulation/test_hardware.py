"""Described devices: a roofline by hand, energy, clusters' links, and what a wrong description is told."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import ConfigError
from distill.simulation.hardware import DESCRIBED, Device, Operation, described, load_cluster, load_device

TOY = Device(
    title="toy", source="none", peak_flops={"fp32": 100.0, "tf32": 1000.0}, memory_bytes_per_s=50.0, memory_bytes=1e9,
    board_watts=200.0, idle_watts=20.0, compute_share=0.5, memory_share=0.8, launch_s=0.25, busy_share=0.9,
)  # fmt: skip

amounts = st.floats(0.0, 1e6)
kernels = st.lists(st.builds(Operation, amounts, amounts, st.sampled_from(["fp32", "tf32"])), max_size=6)


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_traffic_and_a_gap() -> None:
    arithmetic = Operation(flops=200.0, moved_bytes=10.0)  # 200 / (100 * 0.5) = 4 s against 10 / (50 * 0.8) = 0.25 s
    traffic = Operation(flops=200.0, moved_bytes=240.0)  # 6 s
    tensor = Operation(flops=200.0, moved_bytes=10.0, precision="tf32")  # 0.4 s
    assert TOY.seconds([arithmetic]) == pytest.approx(4.25)
    assert TOY.seconds([traffic]) == pytest.approx(6.25)
    assert TOY.seconds([arithmetic, traffic, tensor]) == pytest.approx(4.25 + 6.25 + 0.65)
    assert TOY.seconds([]) == 0.0


@given(kernels)
def test_no_step_is_faster_than_its_arithmetic_or_its_traffic_alone(operations: list[Operation]) -> None:
    seconds = TOY.seconds(operations)
    assert seconds >= sum(one.flops / TOY.peak(one.precision) for one in operations)
    assert seconds >= sum(one.moved_bytes for one in operations) / TOY.memory_bytes_per_s
    twice = replace(TOY, memory_bytes_per_s=100.0, peak_flops={"fp32": 200.0, "tf32": 2000.0}, launch_s=0.125)
    assert twice.seconds(operations) == pytest.approx(seconds / 2)


def test_a_device_without_tensor_cores_computes_convolutions_in_fp32_and_nothing_in_bf16() -> None:
    old = load_device("rtx_2080_ti")
    assert old.peak("tf32") == old.peak("fp32")
    with pytest.raises(ConfigError, match=r"distill\.amp: got 'bf16'; expected off: the RTX 2080 Ti"):
        old.seconds([Operation(1.0, 1.0, "bf16")])


def test_energy_is_busy_and_idle_time_at_their_powers() -> None:
    # 200 W * 0.9 while busy, 20 W while idle; one device busy for 6 of 10 s and one never
    assert TOY.joules([6.0, 0.0], 10.0) == pytest.approx(6 * 180 + 4 * 20 + 10 * 20)


@pytest.mark.parametrize("name", described("device"))
def test_a_described_device_says_where_its_numbers_are_from(name: str) -> None:
    device = load_device(name)
    assert "NVIDIA" in device.source
    assert "not measured" in (DESCRIBED / "devices" / f"{name}.yaml").read_text()
    assert device.peak("fp32") <= device.peak("tf32") < 1e15
    assert 10 < device.idle_watts < device.board_watts * device.busy_share <= device.board_watts
    assert 1e11 < device.memory_bytes_per_s < 1e13
    assert 1e10 < device.memory_bytes < 1e12


def test_the_devices_of_the_issue_and_their_clusters_are_described() -> None:
    assert set(described("device")) >= {"rtx_2080_ti", "rtx_6000", "a100", "h100", "h200"}
    for name in described("cluster"):
        cluster = load_cluster(name)
        assert cluster.devices_per_node >= 1
        assert cluster.between_bytes_per_s <= cluster.within_bytes_per_s


def test_ranks_fill_one_node_after_another() -> None:
    cluster = load_cluster("dgx_h100")
    network = cluster.network(20)
    assert [network.host_of(rank) for rank in (0, 7, 8, 15, 16, 19)] == [0, 0, 1, 1, 2, 2]
    assert network.link(0, 7).bytes_per_s == cluster.within_bytes_per_s * cluster.link_share
    assert network.link(7, 8).bytes_per_s == cluster.between_bytes_per_s * cluster.link_share


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"cluster: got 'dgx_h10'; expected .*'dgx_h100' \(the nearest\).*dgx_a100"):
        load_cluster("dgx_h10")
    with pytest.raises(ConfigError, match=r"device: got 'b3000'; expected .*one of a100, h100"):
        load_device("b3000")


def test_a_cluster_of_ones_own_is_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        (DESCRIBED / "clusters" / "dgx_a100.yaml").read_text().replace("devices_per_node: 8", "devices_per_node: 2")
    )
    assert load_cluster(str(mine)).network(4).hosts == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("devices_per_node: 8", "devices_per_node: 0", "devices_per_node: got 0; expected an integer >= 1"),
        ("link_share: 0.8", "link_share: 1.5", "link_share: got 1.5; expected a number > 0 and <= 1"),
        ("within_latency_s: 3.4e-6", "within_latency_s: fast", "within_latency_s: got 'fast'; expected a number"),
        ("devices_per_node", "gpus", "devices_per_node.*expected these settings and no others"),
        ("title:", "title: [", "expected a YAML file"),
    ],
)
def test_a_wrong_description_is_told_what_is_wrong(tmp_path: Path, before: str, after: str, message: str) -> None:
    text = (DESCRIBED / "clusters" / "dgx_a100.yaml").read_text()
    assert before in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace(before, after))
    with pytest.raises(ConfigError, match=message):
        load_cluster(str(mine))


def test_numbers_may_be_written_as_yaml_does_not_expect_them(tmp_path: Path) -> None:
    text = (DESCRIBED / "devices" / "h100.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("fp32: 67.0e+12", "fp32: 67e12"))
    assert math.isclose(load_device(str(mine)).peak("fp32"), 67e12)
    mine.write_text(text.replace("fp32: 67.0e+12", "fp64: 67e12"))
    with pytest.raises(ConfigError, match="peak_flops"):
        load_device(str(mine))
