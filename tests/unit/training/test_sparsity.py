"""Weights that become zero while a network learns: how many, which, and that they stay it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.training.sparsity import Ramp, Sparsity, by_layer, overall, prunable, smallest

STEPS = 20


class Shared(nn.Module):
    """A convolution, a batch norm, a depthwise one, one layer at two places, a scale a channel, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.again = self.twice
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu())
        return self.last((self.again(self.twice(x).relu()) * self.scale).mean((2, 3)))


def learn(
    network: nn.Module, sparsity: Sparsity, steps: range, optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """Take steps with momentum and a strong weight decay, as fine-tuning does."""
    optimizer = optimizer or torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    )
    for step in steps:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x).square().sum().backward()
        sparsity.before_step(step, STEPS)
        optimizer.step()
        sparsity.after_step(step, STEPS)
    return optimizer


def network() -> Shared:
    torch.manual_seed(0)
    return Shared()


def zeros(module: nn.Module) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in prunable(module).items()}


class TestRamp:
    def test_it_rises_as_a_cubic_from_its_beginning_to_its_end(self) -> None:
        ramp = Ramp(0.8, 0.2, 0.7)
        shares = [ramp.at(step, 1000) for step in range(1000)]
        assert shares[:200] == [0.0] * 200
        assert shares == sorted(shares)
        assert shares[449] == pytest.approx(0.8 * (1 - 0.5**3))
        assert shares[699:] == [0.8] * 301

    def test_the_last_step_is_complete_whatever_the_end(self) -> None:
        assert [Ramp(0.5, 0.0, 1.0).at(total - 1, total) for total in (1, 2, 7, 1000)] == [0.5] * 4


class TestChoice:
    def test_it_is_as_many_as_asked_for_the_first_of_equals(self) -> None:
        values = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 3.0]])
        assert smallest(values, 0).sum() == 0
        assert smallest(values, 3).tolist() == [[True, True, False], [True, False, False]]
        assert smallest(values, 6).all()

    def test_by_layer_takes_the_same_share_of_each(self) -> None:
        torch.manual_seed(0)
        weights = [torch.randn(10, 10), 100 * torch.randn(4, 5)]
        assert [int(gone.sum()) for gone in by_layer(weights, 0.3)] == [30, 6]

    def test_overall_does_not_depend_on_scale_and_leaves_something_of_every_layer(self) -> None:
        torch.manual_seed(0)
        weights = [torch.randn(10, 10), torch.randn(4, 5)]
        chosen, scaled = overall(weights, 0.9), overall([weights[0], 1000 * weights[1]], 0.9)
        assert sum(int(gone.sum()) for gone in chosen) == 108
        assert all(torch.equal(one, other) for one, other in zip(chosen, scaled, strict=True))
        assert not any(gone.all() for gone in overall(weights, 118 / 120))


class TestSparsity:
    def test_only_matrices_become_sparse_those_under_two_names_once(self) -> None:
        assert list(prunable(network())) == ["conv.weight", "depthwise.weight", "twice.weight", "last.weight"]
        with pytest.raises(DistillError, match=r"no matrices of weights"):
            Sparsity(nn.BatchNorm2d(3), Ramp(0.5, 0.0, 1.0), "layer")

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_what_is_zero_stays_zero_through_momentum_and_decay(self, scope: str) -> None:
        model = network()
        sparsity = Sparsity(model, Ramp(0.6, 0.0, 0.5), scope)
        optimizer = learn(model, sparsity, range(STEPS // 2))
        gone = {name: weight == 0 for name, weight in prunable(model).items()}
        assert sparsity.complete
        learn(model, sparsity, range(STEPS // 2, STEPS), optimizer)
        for name, weight in prunable(model).items():
            assert torch.equal(weight == 0, gone[name])
            assert not torch.signbit(weight[gone[name]]).any()  # zeros of one kind: a file has no other
        total = sum(weight.numel() for weight in prunable(model).values())
        assert sum(zeros(model).values()) == pytest.approx(0.6 * total, abs=2)
        assert sparsity.share == sum(zeros(model).values()) / total
        assert all((bias != 0).all() for name, bias in model.named_parameters() if name.endswith("bias"))

    def test_a_break_changes_nothing(self) -> None:
        model = network()
        sparsity = Sparsity(model, Ramp(0.6, 0.1, 0.9), "global")
        optimizer = learn(model, sparsity, range(8))
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state()))
        learn(model, sparsity, range(8, STEPS), optimizer)
        other = network()
        again = Sparsity(other, Ramp(0.6, 0.1, 0.9), "global")
        other.load_state_dict(kept[0])
        optimizer = learn(other, again, range(0))
        optimizer.load_state_dict(kept[1])
        again.load(kept[2])
        assert not again.complete
        learn(other, again, range(8, STEPS), optimizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        again.load({})  # as in the beginning
        assert again.share == 0.0

    def test_means_over_steps_are_judged_with_the_same_zeros(self) -> None:
        model = network()
        sparsity = Sparsity(model, Ramp(0.6, 0.0, 0.5), "layer")
        learn(model, sparsity, range(STEPS))
        found = zeros(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01)
        with sparsity.judged():
            assert zeros(model) == found
