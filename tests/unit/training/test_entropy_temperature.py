"""Temperatures that follow from entropy: the formula, its limits, its gradient and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data import Batch
from distill.errors import ConfigError
from distill.training.losses import soft_target_loss
from distill.training.objective import Address, Outputs, Seen
from distill.training.objectives.entropy_temperature import EntropyTemperature, temperatures
from distill.training.objectives.making import make_objective

SETTINGS = {"temperature": 4.0, "soft_weight": 1.0}


class Given:
    """A teacher's outputs that are known."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        return Outputs(self.logits, {})


def seen(student: Tensor, teacher: Tensor) -> Seen:
    batch = Batch(torch.zeros(len(student), 3, 1, 1), torch.zeros(len(student), dtype=torch.int64))
    return Seen(Outputs(student, {}), batch, Address(0, 0), Given(teacher))


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def test_temperatures_are_those_of_the_formula_for_each_row() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [80.0, 0.0]])
    unsure = 1 + 2 * math.exp(-0.5 * math.log(2))
    between = 1 + 2 * math.exp(0.5 * (0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    found = temperatures(logits, mu=2.0, k=0.5)
    assert found.shape == (3, 1)
    assert found.flatten().tolist() == pytest.approx([unsure, between, 3.0])


def test_the_loss_is_the_divergence_of_predictions_softened_apart() -> None:
    teacher, student = [math.log(3.0), 0.0], [0.0, 0.0]
    of_teacher = 1 + 2 * math.exp(-(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    share = 1 / (1 + math.exp(-teacher[0] / of_teacher))  # the student's is a half at any temperature
    by_hand = 3**2 * share * math.log(share / 0.5) + 3**2 * (1 - share) * math.log((1 - share) / 0.5)
    objective = EntropyTemperature(soft_weight=1.0, mu=2.0, k=1.0)
    assert objective(seen(torch.tensor([student]), torch.tensor([teacher]))).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_without_the_entropy_it_is_hintons_at_one_temperature(temperature: float) -> None:
    student, teacher = random_logits(0), random_logits(1)
    loss = EntropyTemperature(soft_weight=1.0, mu=temperature - 1, k=0.0)(seen(student, teacher))
    torch.testing.assert_close(loss, soft_target_loss(student, teacher, temperature=temperature))


def test_the_gradient_does_not_go_through_the_temperature() -> None:
    student, teacher = random_logits(0).double().requires_grad_(), random_logits(1).double()
    EntropyTemperature(soft_weight=1.0)(seen(student, teacher)).backward()
    of_student, of_teacher = (temperatures(one, mu=3.0, k=1.0) for one in (student, teacher))
    gap = (student / of_student).softmax(1) - (teacher / of_teacher).softmax(1)
    torch.testing.assert_close(student.grad, 4**2 * gap / of_student / len(student), rtol=1e-5, atol=1e-7)


def test_labels_have_the_rest_of_the_weight_and_the_teacher_is_not_asked_without_one() -> None:
    student, teacher = random_logits(0), random_logits(1)
    labels = F.cross_entropy(student, torch.zeros(5, dtype=torch.int64))
    soft = EntropyTemperature(soft_weight=1.0)(seen(student, teacher))
    mixed = EntropyTemperature(soft_weight=0.7)(seen(student, teacher))
    torch.testing.assert_close(mixed, 0.7 * soft + 0.3 * labels)
    alone = seen(student, teacher)
    assert EntropyTemperature(soft_weight=0.0)(alone) == labels
    assert "teacher" not in alone.__dict__


def test_it_is_made_of_its_options_and_refuses_others() -> None:
    made = make_objective("entropy_temperature", options={"mu": 5, "k": 0.5}, settings=SETTINGS)
    assert isinstance(made, EntropyTemperature)
    assert (made.mu, made.k, made.soft_weight) == (5, 0.5, 1.0)
    for options, words in (
        ({"mu": -1}, r"finetune\.options\.mu: got -1; expected a number >= 0"),
        ({"k": "much"}, r"finetune\.options\.k: got 'much'"),
        ({"T": 4}, r"finetune\.options: .*unexpected keyword argument 'T'"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_objective("entropy_temperature", options=options, settings=SETTINGS)
