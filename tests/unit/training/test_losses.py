"""Block losses against their definitions, the soft-target loss against a computation by hand, and labels alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import choices
from distill.data import Batch
from distill.errors import ConfigError
from distill.training.losses import (
    BLOCK_LOSSES,
    mean_squared_error,
    refuse_unusable_loss,
    relative_error,
    soft_target_loss,
)
from distill.training.objective import Address, Distillation, Labels, Outputs, Seen, TeacherHere
from tests.training import batch, same_bits, train, trainer, weights

TEACHER = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 5 + 2


class TestRelativeError:
    def test_of_equal_activations_is_zero(self) -> None:
        assert relative_error(TEACHER.clone(), TEACHER).item() == 0.0

    def test_of_the_mean_is_one(self) -> None:
        assert relative_error(TEACHER.mean().expand_as(TEACHER), TEACHER).item() == pytest.approx(1.0, rel=1e-5)

    def test_does_not_depend_on_scale_and_offset(self) -> None:
        student = TEACHER + 0.1 * torch.sin(TEACHER)
        one, other = relative_error(student, TEACHER), relative_error(100 * student - 7, 100 * TEACHER - 7)
        assert one.item() == pytest.approx(other.item(), rel=1e-4)

    def test_of_a_constant_teacher_is_finite_where_the_student_is_right(self) -> None:
        assert relative_error(torch.ones(2, 3), torch.ones(2, 3)).item() == 0.0

    def test_is_computed_in_float32_whatever_the_student_s_precision(self) -> None:
        error = relative_error(TEACHER.bfloat16(), TEACHER)
        assert error.dtype == torch.float32
        assert 0.0 < error.item() < 1e-4  # bfloat16 keeps 8 bits: (2^-9)^2 is 4e-6


class TestMeanSquaredError:
    def test_is_the_mean_of_the_squares(self) -> None:
        assert mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])).item() == 12.5

    def test_relative_error_is_it_over_the_variance(self) -> None:
        student = TEACHER * 0.9
        expected = mean_squared_error(student, TEACHER) / TEACHER.var(correction=0)
        assert relative_error(student, TEACHER).item() == pytest.approx(expected.item(), rel=1e-6)

    def test_value_and_gradient_are_bitwise_those_of_pytorch_for_a_power_of_two_of_elements(self) -> None:
        one, other = (torch.sin(TEACHER[:4, :2]).requires_grad_() for _ in range(2))
        ours, theirs = mean_squared_error(one, TEACHER[:4, :2]), F.mse_loss(other, TEACHER[:4, :2])
        ours.backward()
        theirs.backward()
        assert torch.equal(ours, theirs)
        assert torch.equal(one.grad, other.grad)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradient_has_the_form_of_the_student_s_output(self, dtype: torch.dtype) -> None:
        student = TEACHER.to(dtype, memory_format=torch.channels_last).requires_grad_()
        output = student * 2
        seen = []
        output.register_hook(seen.append)
        relative_error(output, TEACHER).backward()
        assert seen[0].dtype == dtype
        assert seen[0].stride() == output.stride() == student.stride()

    def test_gradient_is_that_of_its_definition(self) -> None:
        student = torch.sin(TEACHER).requires_grad_()
        relative_error(student, TEACHER).backward()
        expected = 2 * (student.detach() - TEACHER) / TEACHER.numel() / TEACHER.var(correction=0)
        torch.testing.assert_close(student.grad, expected)


def test_block_losses_have_the_names_of_the_configuration() -> None:
    assert {"normalized_mse": relative_error, "mse": mean_squared_error} == BLOCK_LOSSES
    assert (*BLOCK_LOSSES,) == choices.BLOCK_LOSSES


def huber(student: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(student.float(), target.float())


def unreduced(student: Tensor, target: Tensor) -> Tensor:
    return (student - target).square()


def detached(student: Tensor, target: Tensor) -> Tensor:
    return huber(student.detach(), target)


def read_back(student: Tensor, target: Tensor) -> float:
    return huber(student, target).item()


def of_the_target(student: Tensor, target: Tensor) -> Tensor:
    return huber(target.clone().requires_grad_(), target) + 0 * student.sum().detach()


def of_images_alone(student: Tensor, target: Tensor) -> Tensor:
    return student[:, :, :, :, 0].mean()


NO_FUNCTION = 3


class TestLossFromOutside:
    def test_a_block_is_trained_with_it(self) -> None:
        one, other = trainer(loss="mse"), trainer(loss=f"{__name__}:huber")
        readings = train(other, 3)
        assert readings[0].loss == pytest.approx(huber(one.forward(batch(0)[0]), batch(0)[1]).item())
        train(one, 3)
        assert not same_bits(weights(one), weights(other))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_that_can_train_passes(self, dtype: torch.dtype) -> None:
        for loss in (f"{__name__}:huber", *BLOCK_LOSSES):
            refuse_unusable_loss(loss, TEACHER.to(dtype), TEACHER)

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            ("unreduced", r"a scalar tensor as the loss.* it returns a tensor of \(6, 3, 4, 4\)"),
            ("detached", "a loss with a gradient"),
            ("read_back", "it returns float"),
            ("of_the_target", "depends on the student's activation"),
            ("of_images_alone", r"two tensors of \(6, 3, 4, 4\), torch.float32 .*IndexError: too many indices"),
            ("NO_FUNCTION", "a function of two tensors, not <class 'int'>"),
            ("hubber", "'huber' .the nearest"),
        ],
    )
    def test_one_that_cannot_is_refused_by_name(self, function: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            refuse_unusable_loss(f"{__name__}:{function}", TEACHER, TEACHER)
        assert caught.value.setting == "distill.loss"


class TestSoftTargetLoss:
    def test_is_t_squared_times_the_divergence(self) -> None:
        # By hand: teacher softmax(0, ln 3) = (1/4, 3/4), student (1/2, 1/2), so KL = ln 2 - H = ln 2 + sum p ln p.
        temperature = 2.0
        teacher = torch.tensor([[0.0, temperature * math.log(3)]])
        expected = temperature**2 * (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
        assert soft_target_loss(torch.zeros(1, 2), teacher, temperature=temperature).item() == pytest.approx(expected)

    def test_is_a_mean_over_the_batch(self) -> None:
        student, teacher = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 4.0]])
        one = soft_target_loss(student, teacher, temperature=3.0)
        four = soft_target_loss(student.repeat(4, 1), teacher.repeat(4, 1), temperature=3.0)
        assert four.item() == pytest.approx(one.item())

    def test_of_equal_logits_up_to_a_constant_is_zero(self) -> None:
        logits = torch.tensor([[1.0, -2.0, 5.0]])
        assert soft_target_loss(logits + 10, logits, temperature=4.0).item() == pytest.approx(0.0, abs=1e-5)

    @pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
    def test_gradient_is_t_times_the_gap_of_the_softened_predictions(self, temperature: float) -> None:
        # Hinton et al. 2015, equation 2 times T^2: T (softmax(z / T) - softmax(v / T)) for a batch of one.
        student = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
        teacher = torch.tensor([[1.0, 0.0, -1.0]])
        soft_target_loss(student, teacher, temperature=temperature).backward()
        gap = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
        torch.testing.assert_close(student.grad, temperature * gap.detach())

    def test_gradient_at_high_temperature_no_longer_depends_on_it(self) -> None:
        # Equation 4 there: for zero-meaned logits it tends to (z - v) / N.
        student = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)
        teacher = torch.tensor([[-0.5, 0.0, 0.5]])
        soft_target_loss(student, teacher, temperature=1000.0).backward()
        torch.testing.assert_close(student.grad, (student.detach() - teacher) / 3, rtol=0.0, atol=2e-3)


def test_labels_alone_need_no_teacher() -> None:
    class Unused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher ran")

    labelled = Batch(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    logits = torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, 2.0]])
    seen = Seen(Outputs(logits, {}), labelled, Address(seed=0, step=0), TeacherHere(Unused()))
    alone = Distillation(temperature=4.0, soft_weight=0.0)
    assert torch.equal(alone(seen), Labels()(seen))
    with pytest.raises(AssertionError, match="the teacher ran"):
        Distillation(temperature=4.0, soft_weight=0.1)(seen)
