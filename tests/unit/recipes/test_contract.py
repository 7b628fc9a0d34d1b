"""What every recipe must do, whatever it changes; one class over all of them and some of their options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.errors import ConfigError
from distill.profiling.flops import module_flops
from distill.recipes import RECIPES, Changes, Halved, Recipe, Stream, Thin, View
from distill.recipes.crossing import Crossing
from distill.student.assemble import assemble, in_a_row, recalibrate
from distill.student.files import StudentCard
from distill.student.programs import deliver_programs
from distill.teachers import build_architecture
from distill.training.channels import narrowed
from tests.matrix import matrix

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
KEEP = RECIPES["keep"]()
CHANGING = [
    RECIPES["separable"](rank=1, init="teacher"),
    RECIPES["separable"](rank=3, init="random"),
    RECIPES["separable_x2"](),
    RECIPES["separable_x2"](rank=2),
    RECIPES["one_conv"](),
    RECIPES["one_conv"](kernel=1, init="random"),
    RECIPES["bottleneck"](),
    RECIPES["bottleneck"](ratio=0.5, init="random"),
    RECIPES["inverted"](),
    RECIPES["inverted"](expand=1.5, kernel=5, init="teacher"),
    RECIPES["skip"](),
    RECIPES["skip"](init="teacher"),
    RECIPES["lowrank"](),
    RECIPES["lowrank"](form="spatial", ratio=0.3, align=1, init="teacher"),
    RECIPES["lowrank"](form="spatial", rank=8, init="random"),
    RECIPES["thin"](),
    RECIPES["halved"](),
    RECIPES["halved"](ratio=0.25, align=4, init="random"),
    RECIPES["thin"](ratio=0.25, align=4, init="random"),
    RECIPES["stream"](),
    RECIPES["stream"](ratio=0.25, align=4, init="random"),
]


RESNET, *VITS = NETWORKS = {
    "ResNet-20": lambda: build_architecture(source="cifar", name="cifar_resnet20", num_classes=10),
    "ViT of timm": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=10
    ),
    "ViT of torchvision": lambda: torchvision.models.VisionTransformer(16, 8, 4, 4, 32, 64, num_classes=10),
}
# Every recipe, and heads of attention with those that take these away.
CASES = [(recipe, RESNET) for recipe in CHANGING] + [(recipe, name) for name in VITS for recipe in (Thin(), Halved())]


def teacher(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():  # a ViT's head of zeros would say nothing
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def name() -> str:
    return RESNET


@pytest.fixture
def chain(name: str) -> Chain:
    return chain_of(name)


@cache
def chain_of(name: str) -> Chain:
    return cut(teacher(name), IMAGES, granularity=Granularity.residual)


def views(chain: Chain, indices: Iterable[int] = (2, 4)) -> Iterator[tuple[int, View]]:
    """Two blocks: one that keeps shapes, and one with a stride (or, in ViTs, another and the norm behind it)."""
    for block in map(chain.blocks.__getitem__, indices):
        yield (
            block.index,
            View(
                name=block.name,
                module=chain.block_module(block.index),
                sample=chain.run(IMAGES, last=block.index, keep=[block.index])[block.index],
                convolutions=block.convolutions,
                changeable=frozenset(block.modules),
                path=block.name,
            ),
        )


def proposed(recipe: Recipe, chain: Chain) -> list[tuple[int, View, Changes]]:
    if isinstance(recipe, Stream):
        changed, _ = Crossing.of(modules(chain), IMAGES).narrowed(dict.fromkeys(range(len(chain.blocks)), recipe))
        return [(index, view, json.loads(json.dumps(changed[index]))) for index, view in views(chain, changed)]
    found = [(index, view, recipe.propose(view)[0]) for index, view in views(chain)]
    return [(index, view, json.loads(json.dumps(changes))) for index, view, changes in found if changes is not None]


def modules(chain: Chain) -> list[nn.Module]:
    return [chain.block_module(block.index).eval() for block in chain.blocks]


def test_every_recipe_is_here() -> None:
    assert {type(recipe) for recipe in [*CHANGING, KEEP]} == set(RECIPES.values())


@pytest.mark.parametrize("recipe", [*CHANGING, KEEP], ids=str)
def test_options_are_json_with_a_line_of_help_and_rebuild_it(recipe: Recipe) -> None:
    assert type(recipe)(**json.loads(json.dumps(recipe.options()))) == recipe
    assert all(field.metadata["help"] for field in fields(recipe))
    assert recipe.replaces


def test_keep_changes_nothing(chain: Chain) -> None:
    assert [KEEP.propose(view) for _, view in views(chain)] == [(None, {})] * 2


@pytest.mark.parametrize(("recipe", "name"), CASES, ids=str)
class TestEveryChange:
    def test_something_is_changed_and_nothing_that_must_stay(self, recipe: Recipe, chain: Chain) -> None:
        assert proposed(recipe, chain)
        for _, view in views(chain):
            assert recipe.propose(replace(view, changeable=frozenset()))[0] is None

    def test_it_costs_what_was_said_and_no_more_than_the_block(self, recipe: Recipe, chain: Chain) -> None:
        for index, view, changes in proposed(recipe, chain):
            said, student = recipe.cost(view, changes), recipe.student(chain.block_module(index), changes)
            assert said.params == sum(parameter.numel() for parameter in student.parameters())
            reads, _ = recipe.ends(changes)
            assert said.flops == module_flops(student.eval(), narrowed(reads, view.sample[:1]))
            block = chain.block_module(index)
            assert said.params <= sum(parameter.numel() for parameter in block.parameters())
            assert said.flops <= module_flops(block.eval(), view.sample[:1])

    def test_shapes_and_gradients(self, recipe: Recipe, chain: Chain) -> None:
        for index, view, changes in proposed(recipe, chain):
            student = recipe.student(chain.block_module(index), changes, torch.Generator().manual_seed(0))
            reads, gives = recipe.ends(changes)
            # Students without weights pass gradients on all the same.
            out = student.train()(narrowed(reads, view.sample).clone().requires_grad_())
            assert out.shape == narrowed(gives, chain.run(IMAGES, last=index + 1, keep=[index + 1])[index + 1]).shape
            out.square().sum().backward()
            assert all(parameter.grad is not None for parameter in student.parameters())

    def test_first_weights_come_from_the_generator_and_the_block_alone(self, recipe: Recipe, chain: Chain) -> None:
        index, _, changes = proposed(recipe, chain)[0]
        states = []
        for _ in range(2):
            torch.manual_seed(len(states))
            block = chain.block_module(index)
            states.append(recipe.student(block, changes, torch.Generator().manual_seed(1)).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_the_network_is_its_blocks_in_a_row_and_is_rebuilt_without_the_teacher_s_weights(
        self, recipe: Recipe, name: str, chain: Chain
    ) -> None:
        changed = {index: changes for index, _, changes in proposed(recipe, chain)}
        generator = torch.Generator().manual_seed(0)
        modules = {k: recipe.student(chain.block_module(k), changes, generator) for k, changes in changed.items()}
        weights = [module.state_dict() for module in modules.values()]
        student = assemble(teacher(name), changed=[(recipe, changes) for changes in changed.values()], blocks=weights)
        assert in_a_row(student, chain, modules, IMAGES)
        again = NETWORKS[name]()
        for changes in changed.values():
            recipe.install(again, changes)
            assert recipe.paths(changes)
            assert all(again.get_submodule(path) for path in recipe.paths(changes))
        again.load_state_dict(student.state_dict())
        assert torch.equal(again.eval()(IMAGES), student.eval()(IMAGES))


@pytest.mark.parametrize(
    ("recipe", "name"), matrix({(type(recipe), name): (recipe, name) for recipe, name in CASES}.values()), ids=str
)
def test_its_students_are_delivered_in_every_format(recipe: Recipe, name: str, chain: Chain, tmp_path: Path) -> None:
    student = teacher(name)
    for _, _, changes in proposed(recipe, chain):
        recipe.install(student, changes)
    recalibrate(student, [torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))])
    card = StudentCard(
        architecture={}, blocks=[], image_size=16, mean=[0.5] * 3, std=[0.5] * 3, classes=[], resize_shorter_side=16
    )
    records = deliver_programs(tmp_path, student, card, [IMAGES])
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(records, "ok"), records


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("separable", "rank", 0, "an integer >= 1"),
        ("separable", "init", "dta", "'data'"),
        ("separable_x2", "init", "data", "random"),
        ("lowrank", "form", "spacial", "'spatial'"),
        ("lowrank", "energy", 1.5, "a number above 0 and up to 1"),
        ("thin", "ratio", 0.0, "a number above 0 and up to 1"),
        ("stream", "align", 0, "an integer >= 1"),
        ("halved", "ratio", 1.1, "a number above 0 and up to 1"),
        ("one_conv", "kernel", 2, "an odd integer >= 1"),
        ("bottleneck", "align", 0, "an integer >= 1"),
        ("inverted", "expand", 0.0, "a number above 0"),
        ("skip", "init", "none", "one of data, teacher, random"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(name: str, option: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"student.options.{option}: got {value!r}") + f".*{expected}"):
        RECIPES[name](**{option: value})
