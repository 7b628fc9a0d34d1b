"""Whole networks that compute in bf16: passes under autocast, what comes of them in fp32, as losses need it."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data import Batch
from distill.training.objective import Address, Outputs, TeacherOutputs


def in_bf16(device: torch.device) -> torch.autocast:
    """Return the context of a pass in bf16; weights, gradients and optimizers stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def widened(outputs: Outputs) -> Outputs:
    """Return outputs with what is in bf16 in fp32."""
    return Outputs(_widened(outputs.logits), {path: _widened(tensor) for path, tensor in outputs.taps.items()})


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


class InBf16:
    """A teacher's outputs as they come of it in bf16."""

    def __init__(self, source: TeacherOutputs) -> None:
        self._source = source

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        with in_bf16(batch.images.device):
            return widened(self._source.outputs(batch, address))
