"""A network is exported once: the same program is given again, and another network's is its own."""

import pytest
import torch
from torch import Tensor, nn

from distill.student import onnx_programs
from distill.student.onnx_programs import onnx_program


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.layer = factor, nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.layer(images)


def test_a_network_is_exported_once_and_again_where_anything_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    monkeypatch.setattr(onnx_programs, "_exported", lambda *_: made.append(b"%d" % len(made)) or made[-1])
    monkeypatch.setattr(onnx_programs, "_made", onnx_programs.OrderedDict())
    first, sample = Scaled(1.0), torch.zeros(2, 2)
    same, other = Scaled(1.0), Scaled(2.0)
    for network in (same, other):
        network.load_state_dict(first.state_dict())
    assert onnx_program(first, sample) == onnx_program(same, sample) == b"0"
    assert onnx_program(other, sample) == b"1"
    with torch.no_grad():
        same.layer.weight += 1
    assert onnx_program(same, sample) == b"2"
    assert onnx_program(same, torch.zeros(2, 3, 2)) == b"3"


def test_few_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_programs, "_exported", lambda *_: bytes(60))
    monkeypatch.setattr(onnx_programs, "_made", onnx_programs.OrderedDict())
    monkeypatch.setattr(onnx_programs, "KEPT_BYTES", 130)
    for factor in range(5):
        onnx_program(Scaled(float(factor)), torch.zeros(2, 2))
    assert len(onnx_programs._made) == 2
