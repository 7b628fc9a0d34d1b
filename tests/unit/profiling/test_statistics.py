"""What flows into layers: against the outputs that it explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.profiling.statistics import gather, rows_of

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


def test_of_large_images_a_lattice_of_rows_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.profiling.statistics.FEWEST", 200)
    monkeypatch.setattr("distill.profiling.statistics.ENOUGH", 1)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(4, 2, 31, 30, generator=torch.Generator().manual_seed(0))
    every = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    seen = {tuple(row) for row in every.tolist()}
    parts = []
    for turn in range(4):
        rows, pick = rows_of(conv, x, turn=turn)
        assert 200 <= len(rows) < len(every) / 2
        torch.testing.assert_close(pick(conv(x)), rows @ conv.weight.flatten(1).T + conv.bias)
        parts += [tuple(row) for row in rows.tolist()]
    assert set(parts) == seen  # in as many batches as the lattice has places, all of them


def test_the_batch_norm_that_gets_just_what_a_layer_gives_is_told() -> None:
    block = nn.ModuleDict({"a": nn.Conv2d(2, 2, 1), "b": nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(2)}).eval()
    norms = {"norm": block["norm"]}

    def run(x: torch.Tensor) -> torch.Tensor:
        return block["norm"](block["a"](x)) + block["b"](x)

    found = gather({"a": block["a"], "b": block["b"]}, BATCHES, run, norms)
    assert (found["a"].norm, found["b"].norm) == ("norm", None)
