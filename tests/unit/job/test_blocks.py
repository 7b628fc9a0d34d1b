"""What recipes make of the blocks of a network: several recipes in one job, and students without weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.blocks import Blocks, cut_blocks
from distill.student.assemble import assemble, in_a_row
from distill.teachers import build_architecture

CPU = torch.device("cpu")


def cut_with(recipes: str, *settings: str) -> tuple[nn.Module, Blocks]:
    teacher = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10).eval()
    small = ["data=digits", "data.image_size=16", "data.batch_size=4"]
    config = compose([*small, f"student.per_block={recipes}", *settings])
    return teacher, cut_blocks(config, (3, 16, 16), teacher, CPU)


def test_a_student_without_weights_is_put_in_its_place_and_never_planned() -> None:
    shortcut = "tests.shortcut:Shortcut"
    teacher, blocks = cut_with(f"{{layer1.1: {{recipe: {shortcut}}}, layer2.0: {{recipe: {shortcut}}}}}")
    assert [one.name for one in blocks.in_order][:3] == ["separable", shortcut, "separable"]
    assert "not replaced: layer2.0 (its shape changes)" in blocks.remarks
    (number,) = blocks.candidates.keys() - blocks.units.keys()
    assert blocks.candidates[number].input == number == 2
    modules = {one.input: blocks.build(k, torch.Generator().manual_seed(0)) for k, one in blocks.candidates.items()}
    weights = [modules[number].state_dict() for number in blocks.units]
    student = assemble(teacher, changed=[(one.recipe, one.changes) for one in blocks.in_order], blocks=weights)
    assert in_a_row(student, blocks.chain, modules, torch.randn(2, 3, 16, 16))
    assert isinstance(student.get_submodule("layer1.1"), nn.Identity)


def test_a_block_that_is_no_single_module_is_kept_with_the_reason() -> None:
    """The first convolution and the functional ReLU behind it."""
    _, blocks = cut_with("{conv1: {recipe: one_conv}, layer1.0: {recipe: one_conv}}")
    assert any("conv1 (" in remark for remark in blocks.remarks)
    one = blocks.candidates[1]
    assert (one.name, one.changes["module"], one.recipe.options()) == (
        "one_conv",
        "layer1.0",
        {"kernel": 3, "init": "data"},
    )


def test_units_of_a_stream_read_what_those_before_them_give() -> None:
    _, blocks = cut_with("{}", "student=stream", "student.align=8")
    units = [blocks.units[number] for number in range(11)]
    assert [len(unit.gives or ()) for unit in units] == [8, 8, 8, 8, 16, 16, 16, 32, 32, 32, 0]
    assert units[0].reads is units[-1].gives is None
    assert all(one.gives == other.reads for one, other in pairwise(units))


def test_streams_that_another_block_has_too_stay_and_where_all_do_the_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student.recipe: got 'stream'.*conv1.*has another recipe, or none"):
        cut_with("{layer3.1: {recipe: keep}}", "student=stream", "student.align=8")


def activations_of(blocks: Blocks) -> dict[str, list[str]]:
    names = {one.input: blocks.chain.blocks[one.input].name for one in blocks.in_order}
    return {names[one.input]: one.changes.get("activations", {}).get("lma", []) for one in blocks.in_order}


def test_students_of_every_recipe_get_the_activation_that_is_asked_for_and_begin_as_relu() -> None:
    recipes = "{layer1.1: {recipe: skip}, layer2.1: {recipe: separable_x2, init: random}, layer2.2: {recipe: one_conv}}"
    torch.manual_seed(0)
    teacher, blocks = cut_with(recipes, "activation=lma", "student.first_layer=true")
    found = activations_of(blocks)
    assert found["layer1.0"] == ["layer1.0.relu1", "layer1.0.relu2"]
    assert found["layer1.1"] == []
    assert len(found["layer2.1"]) == 6
    assert found["layer2.2"] == ["layer2.2.relu"]
    torch.manual_seed(0)  # the same teacher
    _, plain = cut_with(recipes, "student.first_layer=true")
    for number in (1, 5):
        inputs = torch.randn(2, *blocks.chain.boundaries[blocks.units[number].input].shape[1:])
        one, other = (each.build(number, torch.Generator().manual_seed(0)).eval() for each in (blocks, plain))
        assert torch.equal(one(inputs), other(inputs))
    modules = {one.input: blocks.build(k, torch.Generator().manual_seed(0)) for k, one in blocks.candidates.items()}
    weights = [modules[number].state_dict() for number in blocks.units]
    student = assemble(teacher, changed=blocks.changed, blocks=weights)
    assert in_a_row(student, blocks.chain, modules, torch.randn(2, 3, 16, 16))


def test_an_activation_that_comes_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation: got 'lma'; expected keep: no student block has a ReLU that is"):
        cut_with("{}", "activation=lma", "student.first_layer=true", "blocks.include=[conv1]")
