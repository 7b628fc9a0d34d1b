"""Checkpoints of unfinished work: written whole, read back equal, ignored when damaged."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from distill.storage.checkpoint import Checkpoint, CheckpointFolder, contiguous, unit_name
from distill.storage.files import DiskError


def state(name: str = "03", *, step: int = 40) -> Checkpoint:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    return Checkpoint(
        name=name,
        step=step,
        weights={"conv.weight": values, "norm.num_batches_tracked": torch.tensor(step)},
        optimizer={"conv.weight/exp_avg": values.square(), "conv.weight/step": torch.tensor(float(step))},
        progress={"seconds": 1.5, "rel_error_held_out": None, "best_held_out": float("inf")},
    )


def equal(one: Checkpoint, two: Checkpoint) -> bool:
    tensors = (one.weights, two.weights), (one.optimizer, two.optimizer)
    same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in tensors)
    return same and (one.name, one.step, one.progress) == (two.name, two.step, two.progress)


def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path, generation=1)


def test_what_is_saved_is_loaded_equal(tmp_path: Path) -> None:
    folder(tmp_path).save(state())
    loaded = folder(tmp_path).load("03")
    assert loaded is not None
    assert equal(loaded, state())


def test_a_later_checkpoint_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    one = folder(tmp_path)
    one.save(state(step=40))
    one.save(state(step=80))
    loaded = one.load("03")
    assert loaded is not None
    assert equal(loaded, state(step=80))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["03.safetensors"]


def test_values_survive_whatever_the_memory_format(tmp_path: Path) -> None:
    last = state()
    last.weights["conv.weight"] = last.weights["conv.weight"].to(memory_format=torch.channels_last)
    folder(tmp_path).save(last)
    loaded = folder(tmp_path).load("03")
    assert loaded is not None
    assert equal(loaded, state())


def test_a_checkpoint_that_was_never_written_is_none(tmp_path: Path) -> None:
    assert folder(tmp_path).load("03") is None


def test_a_removed_checkpoint_is_none_and_removing_it_again_is_no_error(tmp_path: Path) -> None:
    one = folder(tmp_path)
    one.save(state())
    one.remove("03")
    one.remove("03")
    assert one.load("03") is None


@pytest.mark.parametrize("kept", [0, 4, 50, -1])
def test_a_checkpoint_cut_short_is_warned_of_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    one = folder(tmp_path)
    one.save(state())
    whole = one.file("03").read_bytes()
    one.file("03").write_bytes(whole[:kept])
    with caplog.at_level(logging.WARNING):
        assert one.load("03") is None
    assert f"checkpoint {one.file('03')}: damaged" in caplog.text
    one.save(state(step=80))
    assert one.load("03") is not None


def test_a_safetensors_file_of_another_origin_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save_file

    one = folder(tmp_path)
    one.file("03").parent.mkdir()
    save_file({"weights/conv.weight": torch.zeros(1)}, one.file("03"))
    assert one.load("03") is None
    assert "03.safetensors: damaged" in caplog.text


def test_on_a_full_disk_the_earlier_checkpoint_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path)
    one.save(state(step=40))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"checkpoints/03\.safetensors: No space left on device"):
        one.save(state(step=80))
    loaded = one.load("03")
    assert loaded is not None
    assert equal(loaded, state(step=40))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["03.safetensors"]


def test_names_of_blocks_have_two_digits_at_least() -> None:
    assert [unit_name(block) for block in (3, 42, 117)] == ["03", "42", "117"]


def test_contiguous_keeps_the_values_and_detaches() -> None:
    tensor = torch.randn(2, 3, 4, 4, requires_grad=True).to(memory_format=torch.channels_last)
    plain = contiguous({"a": tensor})["a"]
    assert torch.equal(plain, tensor)
    assert plain.is_contiguous()
    assert not plain.requires_grad
