"""Networks with one odd thing each: what is replaced, what stays and why, what is refused; and that the assembled
student is then its blocks in a row, whatever files it has gone through.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from distill.blocks.memory_format import to_channels_last, without_overlaps
from distill.config.compose import compose
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.blocks import Blocks, cut_blocks
from distill.job.outputs import refuse_lazy, refuse_other_outputs
from distill.planning.unit import Unit
from distill.storage.aliases import load_state
from distill.storage.checkpoint import contiguous
from distill.student.assemble import assemble, in_a_row, recalibrate
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer
from tests.unit.blocks import odd_networks as odd
from tests.unit.blocks.odd_networks import CLASSES, SIZE, Net, conv

SHAPE, CPU = (3, SIZE, SIZE), torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """`replaced`: the convolutions with a replacement; `words`: of the remarks; `blocks`: how many have a student."""

    build: Callable[[], nn.Module]
    replaced: tuple[str, ...] = ("middle.0", "last")
    words: str = "^$"
    blocks: int | None = None
    overrides: tuple[str, ...] = ()


def middle(*modules: Callable[[], nn.Module], width: int = 8) -> Callable[[], nn.Module]:
    return lambda: Net(*(module() for module in modules), width=width)


WORKING = {
    # convolutions of their own kinds
    "same padding": Case(middle(partial(conv, kind=odd.Same, padding=0))),
    "same padding, stride 2": Case(middle(partial(conv, kind=odd.Same, padding=0, stride=2))),
    "standardised weights": Case(middle(partial(conv, kind=odd.Standardised))),
    "padding in _conv_forward": Case(middle(partial(conv, kind=odd.Padding, padding=0))),
    "constructor of its own": Case(middle(partial(odd.Named, 8))),
    "activating": Case(middle(partial(conv, kind=odd.Activating)), ("last",), r"middle\.0 \(a Activating that does"),
    "mixing": Case(middle(partial(conv, kind=odd.Mixing)), ("last",), "kernel depends on its input"),
    "hook that changes": Case(odd.hooked, ("middle.0",), r"last \(a Conv2d that does more"),
    "hook that listens": Case(odd.heard),
    "weight_norm": Case(odd.with_weight_norm),
    "spectral_norm": Case(odd.with_spectral_norm),
    "old weight_norm": Case(odd.with_old_weight_norm),
    "parametrization": Case(odd.with_parametrization),
    "padding same": Case(middle(partial(conv, padding="same"))),
    "padding valid": Case(middle(partial(conv, padding="valid"))),
    "reflected": Case(middle(partial(conv, padding_mode="reflect"))),
    "circular, dilated": Case(middle(partial(conv, padding_mode="circular", dilation=2, padding=2))),
    "without bias": Case(middle(partial(conv, bias=False))),
    "in groups": Case(middle(partial(conv, groups=2)), ("last",), r"middle\.0 \(its channels are in groups\)"),
    "transposed": Case(middle(partial(conv, kind=nn.ConvTranspose2d)), ("last",), "a ConvTranspose2d"),
    "other dimensions": Case(middle(odd.Cubes), ("last",), r"line \(a Conv1d(.|\n)*cube \(a Conv3d"),
    # several names, several places
    "at two places": Case(odd.at_two_places),
    "two names": Case(odd.Aliased),
    "tied weights": Case(odd.tied, (), "belongs to middle.0 and last"),
    # sizes
    **{f"sizes {way}": Case(partial(odd.Sizes, way), blocks=2) for way in ("size", "shape", "unpacked", "divided")},
    **{f"sizes {way}": Case(partial(odd.Sizes, way), blocks=2) for way in ("expanded", "made")},
    # what a module may own and do
    "odd tensors": Case(odd.Sliced, words="^(not replaced: unused .*)?$"),
    "overwriting": Case(odd.InPlace, ("last",)),
    "branches in training": Case(partial(odd.Branching, conv(), nn.Dropout2d(0.5), nn.AlphaDropout(0.1))),
    "tuple inside": Case(middle(odd.Joined), ("middle.0.parts.one", "middle.0.parts.two", "last")),
    "dicts and lists": Case(middle(odd.Choices), ("middle.0.layers.a", "middle.0.more.0", "last")),
    "no gradient": Case(middle(odd.Detached), ("last",), "frozen .no gradient reaches it"),
    "output not needed": Case(middle(odd.Wasted), ("last",), "wasted"),
    "norm without weights": Case(middle(conv, partial(nn.BatchNorm2d, 8, affine=False))),
    "norm without statistics": Case(middle(conv, partial(nn.BatchNorm2d, 8, track_running_stats=False))),
    "no parameters": Case(middle(nn.Identity, conv, partial(nn.Upsample, scale_factor=2)), ("middle.1", "last")),
    "other norms": Case(middle(conv, partial(nn.GroupNorm, 2, 8), partial(nn.InstanceNorm2d, 8))),
    # never larger than what is replaced: rank (k^2 C + C D) for k^2 C D
    "too few outputs": Case(middle(partial(conv, 8, 1), partial(nn.Conv2d, 1, 8, 1)), ("last",), "parameters for"),
    "listed, untraceable": Case(
        lambda: odd.Untraceable(conv()),
        ("middle.0",),
        overrides=("blocks.granularity=modules", "blocks.modules=[middle]"),
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain list": (odd.Listed, "blocks.exclude.*last.*plain list"),
    "more outputs": (lambda: odd.Output(lambda x: x.repeat(1, 2)), "teacher.factory.*10 outputs.*5 classes"),
    "fewer outputs": (lambda: odd.Output(lambda x: x[:, :2]), "2 outputs.*5 classes"),
    "a tuple": (lambda: odd.Output(lambda x: (x, x)), "in eval mode it gives a tuple of 2.*logits alone"),
    "a dict": (lambda: odd.Output(lambda x: {"logits": x}), "in eval mode it gives a dict of logits"),
    "images": (lambda: odd.Output(lambda x: x[..., None, None]), r"\(batch, 5, 1, 1\): end it with nn.Flatten"),
    "one image": (lambda: odd.Output(lambda x: x[0]), "one tensor of logits"),
    "classes": (lambda: odd.Output(lambda x: x.long()), "int64: classes, not logits"),
    "aux head": (lambda: odd.Output(lambda x: odd.Pair(x, x), in_training=True), "training mode it gives a Pair of 2"),
    "changes its input": (odd.Shifting, "leaves its input as it is"),
    "lazy": (lambda: Net(nn.LazyConv2d(8, 3)), "middle.0.weight is lazy: run the network once"),
    "double": (lambda: Net(conv()).double(), "parameters in float32; stem.weight is float64"),
    "trained on more": (odd.Detector, "runs in training mode too.*targets should be given"),
    "untraceable": (lambda: odd.Untraceable(conv()), "blocks.granularity=modules"),
}  # fmt: skip


@cache
def _config(overrides: tuple[str, ...] = ()) -> JobConfig:
    settings = (
        "teacher=custom",
        "teacher.factory=net:build",
        "data.batch_size=4",
        "student.rank=1",
        "student.init=random",
    )
    return compose([*settings, *overrides])


def _prepared(case: Case) -> tuple[nn.Module, Blocks]:
    torch.manual_seed(0)
    network, config = without_overlaps(case.build()), _config(case.overrides)
    refuse_lazy(config, network)
    to_channels_last(network).eval().requires_grad_(False)
    refuse_other_outputs(config, network, SHAPE, CLASSES)
    return network, cut_blocks(config, SHAPE, network, CPU)


def _images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))


def _trained(blocks: Blocks, block: int) -> bytes:
    """Train a block for two steps with a break in between, as a job does; return its file."""
    chain = blocks.chain

    def fresh() -> BlockTrainer:
        module = blocks.build(block, torch.Generator().manual_seed(block))
        unit, options = Unit.of_block(block, "b"), TrainerOptions(lr=1e-4)
        return BlockTrainer(unit, to_channels_last(module), budget=9, device=CPU, options=options)

    kept = chain.run(_images(), last=block + 1, keep=[block, block + 1])
    first, second = fresh(), fresh()
    first.update(kept[block], kept[block + 1])
    checkpoint = first.checkpoint()
    assert checkpoint is not None
    tensors = load(save(checkpoint.tensors))
    second.resume(checkpoint.of(checkpoint.name, checkpoint.step, tensors, checkpoint.progress))
    second.update(kept[block], kept[block + 1])
    return save(contiguous(second.final().weights))


@pytest.mark.parametrize("name", WORKING)
def test_the_student_is_its_blocks_in_a_row(name: str) -> None:
    case = WORKING[name]
    if not case.replaced:
        with pytest.raises(ConfigError, match=case.words):
            _prepared(case)
        return
    teacher, blocks = _prepared(case)
    assert tuple(blocks.replaced_paths) == case.replaced
    assert re.search(case.words, "\n".join(blocks.remarks)), blocks.remarks
    assert case.blocks is None or len(blocks.candidates) == case.blocks
    weights = {block: load(_trained(blocks, block)) for block in blocks.candidates}
    changed = [(one.recipe, one.changes) for one in blocks.in_order]
    student = assemble(teacher, changed=changed, blocks=weights.values())
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    modules = {block: blocks.student(block, state) for block, state in weights.items()}
    assert in_a_row(student, blocks.chain, modules, _images())
    recalibrate(student, [_images()])
    again = assemble(teacher, changed=changed, blocks=())
    load_state(again, load(save(contiguous(student.state_dict()))))
    rebuilt = without_overlaps(case.build())
    for recipe, changes in changed:
        recipe.install(rebuilt, changes)
    load_state(rebuilt, load(save(contiguous(student.state_dict()))))
    for network in (again, rebuilt):
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(_images(3)), student(_images(3)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_way_out(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        _prepared(Case(build))


def test_the_teacher_and_all_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = Net(conv(), nn.BatchNorm2d(8), nn.Dropout(0.5)).eval().requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    numbers = torch.get_rng_state()
    refuse_other_outputs(_config(), network, SHAPE, CLASSES)
    cut_blocks(_config(), SHAPE, network, CPU)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(module.training for module in network.modules())


def test_nothing_is_made_larger() -> None:
    with pytest.raises(ConfigError, match=r"student\.recipe.*would have 1,2\d\d parameters for 584"):
        cut_blocks(_config(("student.rank=9",)), SHAPE, Net(conv()), CPU)


def test_one_block_says_what_stood_in_the_way() -> None:
    _, blocks = _prepared(Case(lambda: odd.Skipping(conv(), nn.ReLU(), conv())))
    assert "what the input gives is still needed by mean" in blocks.remarks[0]
    assert "blocks.granularity=modules blocks.modules=" in blocks.remarks[0]
