"""The assembled student: blocks' weights in their places, and batch-norm statistics of its own."""

import pytest
import torch
from torch import Tensor, nn

from distill.recipes import Changes, Recipe, Separable, replace_convolutions
from distill.recipes.separable import SeparableConv2d
from distill.student.assemble import assemble, recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(5, 2, 1)),
    )


RECIPE = Separable(rank=1, init="teacher")


def at(*paths: str) -> list[tuple[Recipe, Changes]]:
    return [(RECIPE, {"convolutions": list(paths)})]


def trained_block(index: int, *, seed: int) -> dict[str, Tensor]:
    """A state dict as the ledger holds it: a replaced block's random weights under the teacher's qualified names."""
    copy = network()
    replace_convolutions(copy, [f"{index}.0"], RECIPE, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in copy.state_dict().items()
        if name.startswith(f"{index}.")
    }


class TestAssemble:
    def test_blocks_weights_are_in_place_and_the_rest_is_the_teacher_s(self) -> None:
        teacher = network()
        block = trained_block(1, seed=3)
        student = assemble(teacher, changed=at("1.0"), blocks=[block])
        state = student.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in block.items())
        untouched = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("1.")}
        assert untouched
        assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())
        assert isinstance(student.get_submodule("1.0"), SeparableConv2d)

    def test_the_teacher_is_left_as_it_was(self) -> None:
        teacher = network().requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        student = assemble(teacher, changed=at("0.0", "1.0"), blocks=[trained_block(0, seed=1)])
        assert teacher.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(parameter.requires_grad for parameter in student.parameters())

    def test_the_order_of_the_blocks_does_not_matter(self) -> None:
        blocks = [trained_block(0, seed=1), trained_block(1, seed=2)]
        one = assemble(network(), changed=at("0.0", "1.0"), blocks=blocks).state_dict()
        two = assemble(network(), changed=at("0.0", "1.0"), blocks=blocks[::-1]).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_two_blocks_with_the_same_weights_are_a_bug_of_ours(self) -> None:
        with pytest.raises(AssertionError, match="two blocks hold the same weights"):
            assemble(network(), changed=at("1.0"), blocks=[trained_block(1, seed=1)] * 2)

    def test_weights_that_fit_nowhere_are_a_bug_of_ours(self) -> None:
        with pytest.raises(AssertionError, match=r"1\.0\.depthwise\.weight"):
            assemble(network(), changed=at(), blocks=[trained_block(1, seed=1)])


class TestRecalibrate:
    BATCHES = tuple(
        torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + seed for seed in range(3)
    )

    def test_statistics_are_plain_averages_over_the_batches(self) -> None:
        # In training mode a batch norm passes on what it has normalised by the batch's own statistics.
        student = network()
        student[1][1].running_mean.fill_(7.0)
        expected: dict[str, list[Tensor]] = {"mean0": [], "var0": [], "mean1": [], "var1": []}
        with torch.no_grad():
            for images in self.BATCHES:
                x = student[0][0](images)
                expected["mean0"].append(x.mean((0, 2, 3)))
                expected["var0"].append(x.var((0, 2, 3)))
                norm = student[0][1]
                x = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
                x = student[1][0](x.relu())
                expected["mean1"].append(x.mean((0, 2, 3)))
                expected["var1"].append(x.var((0, 2, 3)))
        recalibrate(student, self.BATCHES)
        for index in (0, 1):
            norm = student[index][1]
            torch.testing.assert_close(norm.running_mean, torch.stack(expected[f"mean{index}"]).mean(0))
            torch.testing.assert_close(norm.running_var, torch.stack(expected[f"var{index}"]).mean(0))

    def test_dropout_stays_off(self) -> None:
        student, seen = network(), []
        student[1][2].register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(inputs[0], output)))
        recalibrate(student, self.BATCHES)
        assert seen == [True] * 3

    def test_momenta_are_restored_and_the_student_is_in_evaluation_mode(self) -> None:
        student = network()
        student[0][1].momentum = 0.25
        student[1][1].momentum = None
        recalibrate(student, self.BATCHES)
        assert (student[0][1].momentum, student[1][1].momentum) == (0.25, None)
        assert not any(module.training for module in student.modules())

    def test_weights_are_not_touched_and_no_gradients_are_kept(self) -> None:
        student = network()
        before = [parameter.clone() for parameter in student.parameters()]
        recalibrate(student, self.BATCHES)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
        assert all(parameter.grad is None for parameter in student.parameters())

    def test_the_same_batches_give_the_same_bits(self) -> None:
        one, two = network(), network()
        two[0][1].running_var.fill_(3.0)  # what stood there before does not matter
        recalibrate(one, self.BATCHES)
        recalibrate(two, self.BATCHES)
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))

    def test_a_network_without_batch_norms_is_left_alone(self) -> None:
        student = nn.Sequential(nn.Conv2d(3, 2, 1))
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        recalibrate(student, self.BATCHES)
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
