"""The recipe stream: what it makes of networks of every family as a whole, and that its first weights are the best."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from distill.blocks.chain import Chain, copied
from distill.blocks.cut import Granularity, cut
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics, gather
from distill.recipes import Changes, Stream, View
from distill.recipes.crossing import Crossing
from distill.recipes.stream import choose_units, with_units
from distill.recipes.surgeon import regularized, repaired
from distill.recipes.zeros import Cropped
from distill.student.assemble import assemble, in_a_row
from distill.teachers import build_architecture
from distill.training.channels import narrowed
from distill.training.losses import relative_error

resnet = torchvision.models.resnet
NETWORKS: dict[str, Any] = {
    "CIFAR ResNet": lambda: build_architecture(source="cifar", name="cifar_resnet20", num_classes=10),
    "BasicBlock": lambda: resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1]),
    "Bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1]),
    "ResNeXt": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "VGG": lambda: nn.Sequential(
        torchvision.models.vgg.make_layers([16, "M", 32, 32, "M", 48], batch_norm=True),
        nn.Flatten(),
        nn.Linear(48 * 64, 24),
        nn.Linear(24, 10),
    ),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(width_mult=0.5),
    "DenseNet": lambda: torchvision.models.DenseNet(16, (2, 2, 2, 2), 32),
    "EfficientNet of timm": lambda: timm.create_model("test_efficientnet"),
    "RegNet": lambda: torchvision.models.RegNet(
        torchvision.models.regnet.BlockParams([1, 2], [32, 48], [8, 16], [1.0, 1.0], [2, 2], 0.25)
    ),
}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HALF = Stream(align=4)
WIDE = 600  # weights an output; what such layers read is left to the norms, which takes seconds less


def lively(network: nn.Module) -> nn.Module:
    """Statistics and weights as training leaves them, so that no two channels can be swapped."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@cache
def teacher_of(name: str) -> nn.Module:
    torch.manual_seed(5)
    return lively(NETWORKS[name]())


@cache
def chain_of(name: str) -> Chain:
    return cut(teacher_of(name), IMAGES[:2], granularity=Granularity.residual)


def modules_of(chain: Chain) -> list[nn.Module]:
    return [chain.block_module(block.index).eval() for block in chain.blocks]


def found(chain: Chain, recipe: Stream = HALF) -> dict[int, Changes]:
    changed, kept = Crossing.of(modules_of(chain), IMAGES[:2]).narrowed(dict.fromkeys(range(len(chain.blocks)), recipe))
    assert not [why for why in kept.values() if "gives something else" in why or "fails" in why]
    return {block: json.loads(json.dumps(changes)) for block, changes in changed.items()}


def in_use(name: str) -> tuple[dict[int, Changes], dict[str, InputStatistics]]:
    """What changes with the units chosen, and the statistics by which they were."""
    changed, network = found(chain_of(name)), teacher_of(name)
    wanted = (path for changes in changed.values() for path in changes["statistics"])
    layers = {path: layer for path in wanted if (layer := network.get_submodule(path)).weight[0].numel() < WIDE}
    norms = {path: module for path, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    seen = gather(layers, [IMAGES], network, norms)
    units = choose_units(copied(network), changed.values(), seen)
    return {block: with_units(changes, units) for block, changes in changed.items()}, seen


def boundaries_of(chain: Chain) -> dict[int, Tensor]:
    return chain.run(IMAGES, last=len(chain.blocks), keep=range(len(chain.blocks) + 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_every_family_fit_together_and_cost_what_is_said(name: str) -> None:
    chain, (changed, seen) = chain_of(name), in_use(name)
    at = boundaries_of(chain)
    students, before, after = {}, 0, 0
    for block, changes in changed.items():
        facts = chain.blocks[block]
        view = View(
            facts.name, chain.block_module(block), at[block], facts.convolutions, frozenset(facts.modules), None
        )
        student = HALF.student(chain.block_module(block), changes, torch.Generator().manual_seed(0), seen).eval()
        reads, gives = HALF.ends(changes)
        inputs, said = narrowed(reads, at[block]), HALF.cost(view, changes)
        assert student(inputs).shape == narrowed(gives, at[block + 1]).shape
        assert said.params == sum(parameter.numel() for parameter in student.parameters())
        assert said.flops == module_flops(student, inputs[:1])
        before, after = before + sum(p.numel() for p in view.module.parameters()), after + said.params
        students[block] = student
    assert after < 0.85 * before
    states = [student.state_dict() for student in students.values()]
    network = assemble(teacher_of(name), changed=[(HALF, one) for one in changed.values()], blocks=states)
    assert in_a_row(network, chain, students, IMAGES)
    again = NETWORKS[name]()
    for changes in changed.values():
        HALF.install(again, json.loads(json.dumps(changes)))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(IMAGES), network.eval()(IMAGES))


@pytest.mark.parametrize("name", ["CIFAR ResNet", "Bottleneck", "MobileNetV2"])
def test_students_start_nearer_to_their_blocks_with_repair_than_without(name: str) -> None:
    chain, (changed, seen) = chain_of(name), in_use(name)
    at = boundaries_of(chain)
    errors = torch.zeros(2, dtype=torch.float64)
    for block, changes in changed.items():
        reads, gives = HALF.ends(changes)
        wanted = narrowed(gives, at[block + 1])
        for place, known in enumerate((seen, {})):
            student = HALF.student(chain.block_module(block), changes, torch.Generator(), known).eval()
            with torch.no_grad():
                errors[place] += relative_error(student(narrowed(reads, at[block])), wanted)
    assert errors[0] < 0.7 * errors[1]


def test_a_layer_that_reads_a_stream_has_the_best_weights_for_what_is_left() -> None:
    chain, (changed, seen) = chain_of("Bottleneck"), in_use("Bottleneck")
    block = next(index for index, facts in enumerate(chain.blocks) if facts.name == "layer1.1")
    reads, _ = HALF.ends(changed[block])
    assert reads is not None
    student = HALF.student(chain.block_module(block), changed[block], torch.Generator(), seen)
    kernel = teacher_of("Bottleneck").get_submodule("layer1.1.conv1").weight.detach().double().flatten(1)
    left = torch.tensor(reads).flatten()
    best = repaired(kernel, regularized(seen["layer1.1.conv1"].covariance), left)[:, left]
    torch.testing.assert_close(student.get_submodule("layer1.1.conv1").weight.detach().flatten(1), best.float())


@pytest.mark.parametrize(("align", "wanted"), [(4, [8, 16, 32]), (16, [16, 16, 32])])
def test_streams_that_zeros_widen_are_as_wide_as_asked_in_every_stage(align: int, wanted: list[int]) -> None:
    """In steps of 16 the first stage's channels stay, and are all that the second has."""
    recipe, chain = Stream(align=align), chain_of("CIFAR ResNet")
    changed = found(chain, recipe)
    students = {
        block: recipe.student(chain.block_module(block), changes, torch.Generator())
        for block, changes in changed.items()
    }
    states = [student.state_dict() for student in students.values()]
    teacher = teacher_of("CIFAR ResNet")
    network = assemble(teacher, changed=[(recipe, changes) for changes in changed.values()], blocks=states)
    assert in_a_row(network, chain, students, IMAGES)
    assert [network.get_submodule(f"layer{stage}.2.conv2").out_channels for stage in (1, 2, 3)] == wanted
    assert (network.conv1.out_channels, network.linear.in_features) == (wanted[0], wanted[2])
    assert isinstance(network.get_submodule("layer2.0.shortcut"), Cropped)


def test_zeros_added_in_a_block_s_own_code_are_as_many_in_the_student() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.last = nn.Conv2d(16, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x).relu()
            return self.last((self.two(y) + F.pad(y, (0, 0, 0, 0, 4, 4))).relu()).mean((2, 3))

    torch.manual_seed(0)
    chain = cut(Widening().eval(), IMAGES[:2], granularity=Granularity.conv)
    recipes = dict.fromkeys(range(len(chain.blocks)), HALF)
    changed, _ = Crossing.of(modules_of(chain), IMAGES[:2]).narrowed(recipes)
    network = Widening()
    for changes in changed.values():
        HALF.install(network, changes)
    assert (network.one.out_channels, network.two.out_channels, network.last.in_channels) == (4, 12, 12)


def test_a_stream_stays_where_a_block_that_has_it_has_another_recipe() -> None:
    chain = chain_of("Bottleneck")
    names = [facts.name for facts in chain.blocks]
    others = {index: HALF for index, name in enumerate(names) if name != "layer2.0"}
    changed, kept = Crossing.of(modules_of(chain), IMAGES[:2]).narrowed(others)
    paths = {path for changes in changed.values() for path in HALF.paths(changes)}
    assert "layer3.0.conv3" in paths
    assert not [path for path in paths if path.startswith(("layer1.0.conv3", "layer2"))]
    assert "another recipe" in kept["layer1.0.conv3"]
    assert "another recipe" in kept["layer2.0.conv3"]


def test_streams_are_alone_and_with_neighbours_and_whoever_is_left_out_stays() -> None:
    chain = chain_of("Bottleneck")
    crossing, every = Crossing.of(modules_of(chain), IMAGES[:2]), dict.fromkeys(range(len(chain.blocks)), HALF)
    runs = [[*run] for run in crossing.runs()]
    first = [run[0] for run in runs if len(run) == 1]
    assert [path.partition(".")[0] for path in first] == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert runs == [first[start:end] for start in range(5) for end in range(start + 1, 6)]
    second = next(run for run in crossing.runs() if [*run] == first[2:3])
    changed, _ = crossing.narrowed(every, [number for numbers in second.values() for number in numbers])
    assert [chain.blocks[block].name for block in changed] == ["layer2.0", "layer3.0"]
    assert crossing.narrowed(every, crossing.numbers) == crossing.narrowed(every)


def test_the_blocks_that_make_a_stream_say_how_wide_it_is() -> None:
    chain = chain_of("Bottleneck")
    stages = {f"layer{stage}": Stream(align=4, ratio=ratio) for stage, ratio in ((1, 0.5), (2, 0.25), (3, 1.0))}
    asked = {index: stages.get(facts.name[:6], HALF) for index, facts in enumerate(chain.blocks)}
    changed, _ = Crossing.of(modules_of(chain), IMAGES[:2]).narrowed(asked)
    network = NETWORKS["Bottleneck"]()
    for block, changes in changed.items():
        asked[block].install(network, changes)
    assert [network.get_submodule(f"layer{n}.0.conv3").out_channels for n in (1, 2, 3, 4)] == [128, 128, 1024, 1024]
    torn = asked | {
        next(index for index, facts in enumerate(chain.blocks) if facts.name == "layer1.1"): Stream(align=8)
    }
    _, kept = Crossing.of(modules_of(chain), IMAGES[:2]).narrowed(torn)
    assert kept["layer1.0.conv3"] == "the blocks that make its channels ask for several widths"
