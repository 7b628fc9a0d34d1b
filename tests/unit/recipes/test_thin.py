"""The recipe thin: what it makes of blocks of every family, and that its first weights are the best there are."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.errors import ConfigError
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics, gather
from distill.recipes import Changes, Thin, View

# Every family once, with as few blocks as the architecture can be asked for.
NETWORKS: dict[str, Any] = {
    "BasicBlock": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]),
    "Bottleneck": lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]),
    "ResNeXt": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4
    ),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(width_mult=0.5),
    "MobileNetV3": torchvision.models.mobilenet_v3_small,
    "DenseNet": lambda: torchvision.models.DenseNet(16, (2, 2, 2, 2), 32),
    "ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1), ls_init_value=1.0),
    "Swin": lambda: torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [7, 7]),
    "EfficientNet of timm": lambda: timm.create_model("test_efficientnet"),
    "TensorFlow's padding": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100"),
    "ViT of timm": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "RegNet": lambda: torchvision.models.RegNet(
        torchvision.models.regnet.BlockParams([1, 2], [32, 48], [8, 16], [1.0, 1.0], [2, 2], 0.25)
    ),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SEED = 5


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@cache
def chain_of(name: str) -> Chain:
    torch.manual_seed(SEED)
    network = NETWORKS[name]()
    for module in network.modules():  # statistics and weights as training leaves them, so that none can be swapped
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return cut(network, IMAGES, granularity=Granularity.residual)


def view_of(chain: Chain, index: int) -> View:
    block, inputs = chain.blocks[index], chain.run(IMAGES, last=index, keep=[index])[index]
    changeable = frozenset(block.modules) - {chain.first_convolution}
    return View(block.name, chain.block_module(index), inputs, block.convolutions, changeable, None)


@torch.enable_grad()
def changes_of(recipe: Thin, view: View) -> Changes:
    changes, _ = recipe.propose(view)
    assert changes is not None
    return changes


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_has_inner_channels_and_costs_what_is_said(name: str) -> None:
    chain, recipe = chain_of(name), Thin(init="teacher")
    before = after = 0
    for index in range(len(chain.blocks)):
        view = view_of(chain, index)
        changes, kept = recipe.propose(view)
        assert not [why for why in kept.values() if "gives something else" in why or "fails" in why]
        if changes is None:
            assert kept
            continue
        changes = json.loads(json.dumps(changes))
        block, student = chain.block_module(index), recipe.student(chain.block_module(index), changes, generator())
        cost = recipe.cost(view, changes)
        assert (cost.params, cost.flops) == (params(student), module_flops(student.eval(), view.sample[:1]))
        assert cost.params < params(block)
        assert cost.flops < module_flops(block.eval(), view.sample[:1])
        before, after = before + params(block), after + params(student)
    assert 0.25 < after / before < 0.75


def block_of(name: str, index: int) -> tuple[Chain, View, nn.Module]:
    chain = chain_of(name)
    return chain, view_of(chain, index), chain.block_module(index)


# One block with every kind of consumer: behind a batch norm, with a bias alone, beside a gate.
KINDS = [("BasicBlock", 1), ("Bottleneck", 2), ("MobileNetV3", 4), ("ConvNeXt", 1), ("ViT of timm", 1)]


def batches_of(view: View) -> list[Tensor]:
    drawn = generator()
    return [view.sample + torch.randn(view.sample.shape, generator=drawn) for _ in range(4)]


def statistics_of(view: View, changes: Changes) -> dict[str, InputStatistics]:
    """Of random inputs like the sample, with the batch norms behind as the block's graph has them."""
    module = view.module.eval()
    layers = {path: module.get_submodule(path) for path in Thin().wants(changes)}
    found = gather(layers, batches_of(view), module)
    norms = {path for path, one in module.named_modules() if isinstance(one, nn.BatchNorm2d)}
    behind = {path: _norm_behind(module, path, norms) for path in found}
    return {path: InputStatistics(one.mean, one.covariance, one.rows, behind[path]) for path, one in found.items()}


def _norm_behind(module: nn.Module, path: str, norms: set[str]) -> str | None:
    (node,) = [node for node in module.graph.nodes if node.target == path]  # type: ignore[union-attr]
    users = [str(user.target) for user in node.users]
    return users[0] if len(users) == 1 and users[0] in norms else None


@pytest.mark.parametrize(("name", "index"), KINDS)
@pytest.mark.parametrize("init", ["data", "teacher"])
def test_at_full_width_the_student_is_the_teacher(name: str, index: int, init: str) -> None:
    chain, view, block = block_of(name, index)
    assert Thin(ratio=1.0, init=init).propose(view)[0] is None
    changes = changes_of(Thin(init=init), view)
    seen = statistics_of(view, changes)
    full = {**changes, "groups": [{**group, "kept": group["units"]} for group in changes["groups"]]}
    student = Thin(init=init).student(block, full, generator(), seen).eval()
    assert torch.equal(student(view.sample), chain.block_module(index).eval()(view.sample))


@pytest.mark.parametrize(("name", "index"), KINDS)
@pytest.mark.parametrize("init", ["data", "teacher"])
def test_channels_that_nothing_reads_are_those_that_go_and_are_not_missed(name: str, index: int, init: str) -> None:
    _, view, block = block_of(name, index)
    changes = changes_of(Thin(init=init), view)
    for module in (view.module, block):
        for group in changes["groups"]:
            for site in [*group["consumers"], *group["gates"]]:
                dead = torch.randperm(group["units"], generator=generator())[group["kept"] :]
                weight = module.get_submodule(site["path"]).weight.detach()
                weight.unflatten(1, (-1, site["each"]))[:, dead] = 0.0
    wanted = block.eval()(view.sample)
    seen = statistics_of(view, changes)
    student = Thin(init=init).student(block, changes, generator(), seen).eval()
    torch.testing.assert_close(student(view.sample), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "index"), KINDS)
@torch.no_grad()
def test_data_is_better_than_norms(name: str, index: int) -> None:
    chain, view, teacher = block_of(name, index)
    changes = changes_of(Thin(), view)
    seen = statistics_of(view, changes)
    x = batches_of(view)[0]  # fewer rows than columns, so on others it need not be
    wanted = teacher.eval()(x)
    errors = {}
    for init in ("data", "teacher"):
        student = Thin(init=init).student(chain.block_module(index), changes, generator(), seen)
        errors[init] = float((student.eval()(x) - wanted).norm())
    assert errors["data"] < 0.9 * errors["teacher"]


@torch.no_grad()
def test_the_batch_norm_behind_has_the_statistics_that_its_input_will_have() -> None:
    _, view, block = block_of("BasicBlock", 1)
    changes = changes_of(Thin(), view)
    seen = statistics_of(view, changes)
    means = [batch.mean((0, 2, 3)) for batch in outputs_of(view.module, "layer1.0.bn2", batches_of(view))]
    student = Thin().student(block, changes, generator(), seen).eval()
    heard = torch.cat(inputs_of(student, "layer1.0.bn2", batches_of(view)))
    norm = student.get_submodule("layer1.0.bn2")
    torch.testing.assert_close(norm.running_mean, heard.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, heard.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)
    after = [batch.mean((0, 2, 3)) for batch in outputs_of(student, "layer1.0.bn2", batches_of(view))]
    torch.testing.assert_close(sum(after), sum(means), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_where_no_norm_follows_the_bias_keeps_the_mean() -> None:
    _, view, block = block_of("ViT of timm", 1)
    changes = changes_of(Thin(), view)
    seen = statistics_of(view, changes)
    wanted = torch.cat(outputs_of(view.module, "blocks.0.mlp.fc2", batches_of(view))).mean((0, 1))
    student = Thin().student(block, changes, generator(), seen).eval()
    found = torch.cat(outputs_of(student, "blocks.0.mlp.fc2", batches_of(view))).mean((0, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def outputs_of(module: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    return [out for _, out in _heard(module, path, batches)]


def inputs_of(module: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    return [given for given, _ in _heard(module, path, batches)]


def _heard(module: nn.Module, path: str, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    heard: list[tuple[Tensor, Tensor]] = []
    layer = module.get_submodule(path)
    hook = layer.register_forward_hook(lambda _, given, out: heard.append((given[0], out)))
    for batch in batches:
        module.eval()(batch)
    hook.remove()
    return heard


@torch.no_grad()
def test_a_gate_gets_what_it_no_longer_sees_on_average() -> None:
    _, view, block = block_of("MobileNetV3", 4)
    changes = changes_of(Thin(), view)
    gate = changes["groups"][0]["gates"][0]["path"]
    assert gate in changes["statistics"]
    one = {**changes, "groups": changes["groups"][:1]}  # the gate's own outputs stay
    wanted = torch.cat(outputs_of(view.module, gate, batches_of(view))).mean((0, 2, 3))
    student = Thin().student(block, one, generator(), statistics_of(view, changes)).eval()
    found = torch.cat(outputs_of(student, gate, batches_of(view))).mean((0, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_without_statistics_the_weights_decide() -> None:
    chain, view, _ = block_of("Bottleneck", 2)
    changes = changes_of(Thin(), view)
    assert Thin(init="teacher").wants(changes) == []
    one, two = (
        Thin(init=init).student(chain.block_module(2), changes, generator()).state_dict()
        for init in ("data", "teacher")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_random_weights_come_from_the_generator_alone() -> None:
    chain, view, _ = block_of("Bottleneck", 2)
    changes = changes_of(Thin(init="random"), view)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        student = Thin(init="random").student(chain.block_module(2), changes, torch.Generator().manual_seed(seed))
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["layer2.0.conv2.weight"], states[2]["layer2.0.conv2.weight"])


def test_what_the_user_keeps_stays() -> None:
    _, view, _ = block_of("Bottleneck", 2)
    changes, kept = Thin().propose(replace(view, changeable=view.changeable - {"layer2.0.bn1"}))
    assert changes is not None
    assert [group["producers"][0]["path"] for group in changes["groups"]] == ["layer2.0.conv2"]
    assert kept == {"layer2.0.conv1": "a layer that has its channels is to stay"}


def test_a_block_that_is_cut_by_hooks_is_traced_by_itself() -> None:
    torch.manual_seed(SEED)
    network = NETWORKS["BasicBlock"]()
    module = nn.Sequential(network.layer1, nn.ReLU())
    view = View("0", module, torch.randn(2, 64, 8, 8, generator=generator()), (), frozenset(_owners(module)), None)
    changes, kept = Thin().propose(view)
    assert changes is not None
    assert Thin().paths(changes) == ["0.0.conv1", "0.0.bn1", "0.0.conv2"]
    assert kept == {}


def _owners(module: nn.Module) -> list[str]:
    return [path for path, one in module.named_modules() if any(True for _ in one.parameters(recurse=False))]


@pytest.mark.parametrize(("name", "index"), KINDS)
def test_the_student_can_be_exported(name: str, index: int) -> None:
    _, view, block = block_of(name, index)
    changes = changes_of(Thin(), view)
    student = Thin().student(block, changes, generator()).eval()
    program = torch.export.export(student, (view.sample,))
    torch.testing.assert_close(program.module()(view.sample), student(view.sample))


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 1.5}, {"align": 0}, {"init": "best"}], ids=str)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"student.options.{next(iter(options))}"):
        Thin(**options)


def test_networks_without_layers_between_others_are_refused_at_once() -> None:
    assert Thin().suits(NETWORKS["BasicBlock"](), first_layer=False)
    two = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert Thin().suits(two, first_layer=True)
    assert not Thin().suits(two, first_layer=False)
