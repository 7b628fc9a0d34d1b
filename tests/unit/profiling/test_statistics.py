"""What flows into layers: against the outputs that it explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.profiling.statistics import gather

BATCHES = [torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
FORMS = [{}, {"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_convolution_s_outputs_follow_from_mean_and_covariance_of_its_patches(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, bias=False, **options).double()
    found = gather({"conv": conv}, BATCHES, lambda batch: conv(batch.double()))["conv"]
    outputs = torch.cat([conv(batch.double()).flatten(2).transpose(1, 2).reshape(-1, 4) for batch in BATCHES])
    weight = conv.weight.detach().flatten(1)
    assert found.rows == len(outputs)
    torch.testing.assert_close(weight @ found.mean, outputs.mean(0), rtol=1e-5, atol=1e-6)
    centred = outputs - outputs.mean(0)
    covariance = centred.T @ centred / len(outputs)
    torch.testing.assert_close(weight @ found.covariance @ weight.T, covariance, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_sees_every_position_of_its_input() -> None:
    linear = nn.Linear(6, 3)
    found = gather({"linear": linear}, BATCHES, linear)["linear"]
    rows = torch.cat([batch.reshape(-1, 6) for batch in BATCHES]).double()
    torch.testing.assert_close(found.mean, rows.mean(0))
    assert found.rows == len(rows)


def test_layers_without_one_matrix_are_refused() -> None:
    with pytest.raises(TypeError, match="dense"):
        gather({"grouped": nn.Conv2d(4, 4, 3, groups=2)}, [], nn.Identity())
