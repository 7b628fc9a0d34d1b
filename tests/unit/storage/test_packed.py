"""Packed files: what is read is what was written, the bytes that they take, and what a damaged one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.storage.files import DamagedFileError
from distill.storage.packed import Kept, load_packed, save_packed


def sparse(*shape: int, zeros: float = 0.9) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).masked_fill(torch.rand(shape) < zeros, 0.0)


def state() -> dict[str, Tensor]:
    kernel = sparse(16, 8, 3, 3)
    return {
        "kernel": kernel,
        "again": kernel,  # of one tensor the first name is written
        "last": kernel.clone().to(memory_format=torch.channels_last),
        "odd": sparse(7, 3, zeros=0.5),
        "dense": torch.randn(5, 4),
        "scale": torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf")]),
        "half": sparse(6, 9).bfloat16(),
        "zeros": torch.zeros(4, 3),
        "none": torch.zeros(0, 3),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_what_is_read_is_bitwise_what_was_written(tmp_path: Path) -> None:
    size = save_packed(tmp_path / "a.safetensors", state())
    assert size == (tmp_path / "a.safetensors").stat().st_size
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    found = load_packed(tmp_path / "b.safetensors")
    expected = {name: tensor for name, tensor in state().items() if name != "again"}
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def test_a_sparse_matrix_takes_a_bit_for_each_and_the_bytes_of_what_is_left(tmp_path: Path) -> None:
    weight = sparse(256, 512, zeros=0.95)
    left = int(weight.count_nonzero())
    size = save_packed(tmp_path / "a", {"weight": weight})
    assert 0 < size - weight.numel() // 8 - 4 * left < 600
    small = save_packed(tmp_path / "b", {"weight": weight}, Kept.int8)
    assert 0 < small - weight.numel() // 8 - left - 4 * 256 < 700


def test_int8_gives_its_own_values_again_and_leaves_what_is_no_matrix(tmp_path: Path) -> None:
    save_packed(tmp_path / "a", state(), Kept.int8)
    found = load_packed(tmp_path / "a")
    for name in ("scale", "zeros", "none", "count", "mask"):
        assert bits(found[name]) == bits(state()[name])
    for name in ("kernel", "odd", "dense"):
        wanted = state()[name].flatten(1)
        step = wanted.abs().amax(1, keepdim=True) / 127
        assert ((found[name].flatten(1) - wanted).abs() <= step / 2 * 1.001).all()
        assert not found[name][state()[name] == 0].any()
    save_packed(tmp_path / "b", found, Kept.int8)
    again = load_packed(tmp_path / "b")
    assert all(torch.allclose(again[name], found[name], rtol=1e-6) for name in ("kernel", "odd", "dense"))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    save_packed(path, state())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError, match=r"a\.safetensors: damaged, or no packed file"):
        load_packed(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_packed(path, state())
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.safetensors: damaged: its tensors are not those that were written"):
        load_packed(path)
    with pytest.raises(DamagedFileError, match=r"nowhere: missing"):
        load_packed(tmp_path / "nowhere")
