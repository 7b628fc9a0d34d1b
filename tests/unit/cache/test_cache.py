"""Recorded activations: what is written is read, in its form and precision, and only as much as there is room for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.blocks.chain import Boundary
from distill.cache.places import GIB, File, Memory, Place
from distill.cache.rows import Cache, Layout, map_file, measure_prices, sample_of
from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.errors import ConfigError
from distill.job.cache import Caching
from distill.planning.costs import Costs, Span
from distill.planning.placement.plans import plan_cached
from distill.planning.placement.problems import cached_problem
from distill.storage.files import DamagedFileError, write_json
from tests.unit.planning.test_strategies import Instance, brute_force, instances

CPU = torch.device("cpu")


def opened(layout: Layout, place: Place | None = None) -> Cache:
    place = place or Memory()
    place.reserve(layout.nbytes)
    return Cache(map_file(place.path, layout.nbytes), layout)


@st.composite
def forms(draw: st.DrawFn) -> Boundary:
    """A boundary of two to four dimensions, nested in any order."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    return Boundary.of(tensor)


@settings(deadline=None)
@given(st.lists(forms(), min_size=1, max_size=3), st.integers(1, 9), st.randoms(use_true_random=False), st.booleans())
def test_rows_come_back_in_any_order_and_in_their_form(
    found: list[Boundary], num_rows: int, random, half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    layout = Layout(dict(enumerate(found, start=2)), dtype, num_rows)
    cache = opened(layout)
    whole = {k: form.conform(torch.randn(num_rows, *form.shape[1:])) for k, form in layout.forms.items()}
    cut = random.randint(0, num_rows)
    for first, last in ((cut, num_rows), (0, cut)):
        cache.write(first, {k: tensor[first:last] for k, tensor in whole.items()})
    order = torch.tensor([random.randrange(num_rows) for _ in range(random.randint(1, 12))])
    some = random.sample(list(whole), random.randint(1, len(whole)))
    for rows in (order, slice(cut, num_rows)):
        read = cache.read(rows, some, CPU)
        assert list(read) == some
        for boundary, tensor in read.items():
            expected = whole[boundary][rows].to(dtype).float()
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected)
            assert tensor.stride() == layout.forms[boundary].strides_for(tuple(expected.shape))


def channels_last(*shape: int) -> Boundary:
    return Boundary.of(torch.empty(shape).to(memory_format=torch.channels_last))


LAYOUT = Layout({1: channels_last(4, 8, 3, 3), 2: channels_last(4, 5, 2, 2)}, torch.float32, 100)


def test_sizes_are_those_of_the_rows_in_whole_pages() -> None:
    assert LAYOUT.row_bytes == 4 * (8 * 9 + 5 * 4)
    assert 100 * LAYOUT.row_bytes <= LAYOUT.nbytes < 100 * LAYOUT.row_bytes + 2 * 4096
    half = Layout(LAYOUT.forms, torch.bfloat16, 100)
    assert half.row_bytes == LAYOUT.row_bytes / 2


def test_all_who_map_a_place_see_what_one_of_them_writes(tmp_path: Path) -> None:
    for place in (Memory(), File(tmp_path, key="k", writer="w")):
        one = opened(LAYOUT, place)
        other = Cache(map_file(place.path, LAYOUT.nbytes), LAYOUT)
        rows: dict[int, Tensor] = {k: torch.randn(7, *form.shape[1:]) for k, form in LAYOUT.forms.items()}
        one.write(40, rows)
        assert torch.equal(other.read(slice(40, 47), [2], CPU)[2], rows[2])
        place.finish()
        assert torch.equal(other.read(torch.tensor([46, 40]), [1], CPU)[1], rows[1][[6, 0]])


def test_memory_leaves_nothing_behind() -> None:
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    place = Memory()
    opened(LAYOUT, place)
    place.finish()
    assert (set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))) == before


def test_more_than_the_free_memory_is_refused_before_it_is_used(available: Callable[[int], None]) -> None:
    available(GIB)
    Memory().reserve(GIB)
    with pytest.raises(ConfigError, match=r"^teacher.cache: got 'ram'; expected disk, or .* 1.50 GiB of the 1.00 GiB"):
        Memory().reserve(GIB * 3 // 2)


def test_a_file_is_found_once_it_is_finished_and_only_by_its_key(tmp_path: Path) -> None:
    first = File(tmp_path, key="k", writer="w")
    assert not first.complete
    opened(LAYOUT, first).write(0, {k: torch.ones(1, *form.shape[1:]) for k, form in LAYOUT.forms.items()})
    assert not File(tmp_path, key="k", writer="w").complete, "an unfinished file is none"
    first.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["k.json", "k.rows"]
    assert File(tmp_path, key="k", writer="another").complete
    assert not File(tmp_path, key="other", writer="w").complete
    read = Cache(map_file(File(tmp_path, key="k", writer="w").path, LAYOUT.nbytes), LAYOUT).read(slice(0, 1), [1], CPU)
    assert read[1].eq(1).all()


def filled(folder: Path) -> File:
    place = File(folder, key="k", writer="w")
    opened(LAYOUT, place).write(0, {k: torch.ones(1, *form.shape[1:]) for k, form in LAYOUT.forms.items()})
    place.finish()
    return File(folder, key="k", writer="w")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3])])
@pytest.mark.parametrize("name", ["k.rows", "k.json"])
def test_what_is_damaged_is_told_and_recorded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    whole = filled(tmp_path)
    whole.check()
    assert whole.complete
    damage(tmp_path / name)
    place = File(tmp_path, key="k", writer="w")
    place.check()
    assert not place.complete
    if (name, damage) != ("k.rows", Path.unlink):  # which is none
        assert f"cache: {tmp_path / name}: " in caplog.text
        assert "it is recorded again" in caplog.text
    place.reserve(LAYOUT.nbytes)
    place.finish()
    again = File(tmp_path, key="k", writer="w")
    again.check()
    assert again.complete


def test_a_folder_in_the_place_of_the_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k.rows").mkdir()
    write_json(tmp_path / "k.json", {"sha256": ""})
    with pytest.raises(DamagedFileError, match=r"k\.rows: a folder is in its place; remove it"):
        File(tmp_path, key="k", writer="w").check()


def test_two_writers_of_one_file_do_not_disturb_one_another(tmp_path: Path) -> None:
    files = [File(tmp_path, key="k", writer=name) for name in "ab"]
    for file in files:
        file.reserve(LAYOUT.nbytes)
    for file in files:
        file.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["k.json", "k.rows"]


def test_what_a_writer_left_unfinished_is_replaced(tmp_path: Path) -> None:
    left = File(tmp_path, key="k", writer="w")
    left.reserve(10)
    left.path.write_bytes(b"half a row")
    stray = map_file(left.path, 10)
    again = File(tmp_path, key="k", writer="w")
    again.reserve(LAYOUT.nbytes)
    stray[:3] = b"old"  # a rank of the last attempt that has not gone yet
    assert again.path.stat().st_size == LAYOUT.nbytes
    assert set(again.path.read_bytes()) == {0}
    again.discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_folder_that_cannot_be_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^cache.dir: .*0.00 GiB free that can be written to \(Not a directory\)"):
        File(tmp_path / "file" / "folder", key="k", writer="w").reserve(100)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"^cache.dir: .*2.00 GiB free that can be written to \(No space left"):
        File(tmp_path / "full", key="k", writer="w").reserve(2 * GIB)
    assert not list((tmp_path / "full").iterdir()), "nothing is left of it"


def test_prices_are_measured_on_a_sample() -> None:
    sample = sample_of(Layout(LAYOUT.forms, torch.float32, 10**9))
    assert 64 * 2**20 < sample.nbytes < 256 * 2**20
    assert sample_of(LAYOUT) == LAYOUT
    prices = measure_prices(opened(LAYOUT), batch_size=32, device=CPU)
    assert prices.write_s > 0
    assert prices.read_s > 0


def test_a_rank_whose_block_costs_nothing_is_not_taken_for_an_empty_one() -> None:
    costs = Costs((0.0,) * 3, (0.0,) * 3, (0, 1, 0, 1), slowness=(0.5, 0.5), read_s_per_byte=1e-3)
    plan = plan_cached(costs, [Span(block, 0, 10) for block in range(3)], 2)
    assert plan.predicted_makespan_s == pytest.approx(0.005)  # a byte each; all three blocks together read two


@settings(deadline=None, max_examples=50)
@given(instances(), st.sampled_from([0.0, 1e-3]))
def test_no_placement_beats_a_cached_plan(instance: Instance, read_s_per_byte: float) -> None:
    costs, spans, world_size = instance
    costs = Costs(
        costs.teacher_s, costs.student_s, costs.boundary_bytes, slowness=costs.slowness, read_s_per_byte=read_s_per_byte
    )
    plan = plan_cached(costs, spans, world_size)
    assert plan.predicted_makespan_s == pytest.approx(brute_force(cached_problem(costs, spans, world_size)))


def test_neighbours_read_their_common_boundary_once_and_the_teacher_costs_nothing() -> None:
    costs = Costs((9.0,) * 3, (1.0, 2.0, 3.0), (10, 20, 30, 40), read_s_per_byte=0.1)
    plan = plan_cached(costs, [Span(block, 0, 5) for block in range(3)], 1)
    assert plan.strategy == "cached"
    assert plan.predicted_makespan_s == pytest.approx(5 * (1 + 2 + 3 + 0.1 * 100))


def recorded_from(root: Path) -> Any:
    """What decides whether a file recorded from the images at `root` is used again."""
    caching: Any = object.__new__(Caching)
    config = compose(["data=imagefolder", f"data.root={root}"])
    caching._context = SimpleNamespace(config=config, identity=identity(config), device=CPU)
    caching._contents, caching._teacher = SimpleNamespace(held_out=0), nn.Identity()
    return caching._facts(LAYOUT)


def test_a_file_recorded_from_a_folder_of_images_is_for_those_images(tmp_path: Path) -> None:
    for place in ("here", "there", "elsewhere"):
        (tmp_path / place / "train" / ("dog" if place == "elsewhere" else "cat")).mkdir(parents=True)
    found = {place: recorded_from(tmp_path / place) for place in ("here", "there", "elsewhere")}
    assert found["here"] == found["there"] != found["elsewhere"]
