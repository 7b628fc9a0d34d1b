"""CUDA graphs and lanes on a device: what is replayed gives what was computed kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.cut import Chain, Granularity, cut
from distill.cuda.graphs import WARM_UPS, Captured, cuda_capture
from distill.cuda.lanes import Lane, lanes
from distill.data import Dataset
from distill.planning.unit import Unit
from distill.teachers import build_architecture
from distill.training.graphed_teacher import GraphedChain
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer
from tests.dist.ranks import run_ranks
from tests.opened import opened

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 12


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def chain() -> Chain:
    torch.manual_seed(0)
    network = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    network = network.cuda().to(memory_format=torch.channels_last)
    return cut(network, images(0), granularity=Granularity.residual)


def images(step: int) -> Tensor:
    batch = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return batch.cuda().to(memory_format=torch.channels_last)


def averaged_with_nobody(tensors: list[Tensor]) -> Callable[[], None]:
    """Take the gradients away as an all-reduce does, and bring them back later."""
    means = [tensor.clone() for tensor in tensors]

    def finish() -> None:
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)

    return finish


def train(
    lanes_of: list[Lane], optimizer: str, amp: str, *, shared: bool = False
) -> tuple[dict[str, Tensor], list[BlockTrainer]]:
    """Train three blocks as the engine does, or as in a group of this rank alone; return all weights and losses."""
    teacher = chain()
    trainers = [
        BlockTrainer(
            Unit.of_block(block, str(block)),
            teacher.block_module(block).to(memory_format=torch.channels_last),
            budget=STEPS,
            device=torch.device("cuda"),
            options=TrainerOptions(optimizer=optimizer, amp=amp, clip_norm=1.0, log_every=5),
            lane=lanes_of[block % len(lanes_of)],
        )
        for block in (1, 4, 9)
    ]
    for trainer in trainers:
        torch.manual_seed(trainer.unit.number)
        for parameter in trainer.module.parameters():
            nn.init.normal_(parameter, std=0.1)
        if shared:
            trainer.share(averaged_with_nobody)
    for step in range(STEPS):
        boundaries = teacher.run(images(step), last=10, keep=range(11))
        for trainer in trainers:
            with trainer.lane.entered():
                trainer.update(boundaries[trainer.unit], boundaries[trainer.unit + 1])
        if step == STEPS // 2:
            assert all(trainer.checkpoint() is not None for trainer in trainers)
        del boundaries  # a lane that still reads them would now read what the next pass writes
    found = {f"{t.unit} {name}": tensor for t in trainers for name, tensor in t.final().weights.items()}
    found |= {f"{t.unit} error": torch.tensor(t.progress.rel_error_last) for t in trainers}
    return found, trainers


@pytest.mark.parametrize(("optimizer", "amp"), [("adam", "off"), ("adam", "bf16"), ("sgd", "off"), ("rmsprop", "off")])
def test_captured_updates_on_lanes_give_what_plain_ones_give(optimizer: str, amp: str) -> None:
    plain, _ = train([Lane()], optimizer, amp)
    captured, trainers = train(lanes(torch.device("cuda")), optimizer, amp)
    assert all(trainer._update._replay is not None for trainer in trainers), "nothing was captured"
    for name, expected in plain.items():
        torch.testing.assert_close(
            captured[name], expected, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_captured_updates_whose_gradients_are_averaged_give_what_plain_ones_give() -> None:
    plain, _ = train([Lane()], "adam", "off")
    captured, trainers = train(lanes(torch.device("cuda")), "adam", "off", shared=True)
    assert all(trainer._apply._replay is not None for trainer in trainers), "nothing was captured"
    for name, expected in plain.items():
        torch.testing.assert_close(captured[name], expected, rtol=1e-3, atol=1e-4)


def goes_on_uncaptured(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Run what cannot be captured, because it waits for the device; the results must be right and on the lane."""
    lane = lanes(torch.device("cuda"))[0]

    def work(x: Tensor) -> list[Tensor]:
        return [x * x.sum().item()]

    captured = Captured(work, name="work", capture=cuda_capture(lane), lane=lane)
    for step in range(WARM_UPS + 3):
        x = torch.full((4,), float(step), device="cuda")
        with lane.entered():
            (found,) = captured(x)
            assert torch.cuda.current_stream() == lane.stream
        lane.join()
        torch.testing.assert_close(found, x * x.sum())
    assert captured._replay is None


def test_a_failed_capture_leaves_the_lane_and_the_results_as_they_were() -> None:
    run_ranks(goes_on_uncaptured, 1, start_method="spawn")  # a process of its own: it captures nothing afterwards


def test_a_long_update_holds_up_no_other_lane() -> None:
    one, other, *_ = lanes(torch.device("cuda"))
    cycles = [1000]

    def long(x: Tensor) -> list[Tensor]:
        torch.cuda._sleep(cycles[0])
        return [x + 1]

    works = [(long, one), (lambda x: [x + 1], other), (lambda x: [x + 1], one), (lambda x: [x + 1], other)]
    updates = [(Captured(work, name="work", capture=cuda_capture(lane), lane=lane), lane) for work, lane in works]
    x = torch.ones(16, device="cuda")
    for _ in range(2):  # the second time nothing is allocated, which waits for the device
        for update, lane in updates:
            with lane.entered():
                update(x)
        ends = one.mark(), other.mark()
        cycles[0] = 1_000_000_000  # about half a second
    assert ends[0] is not None
    assert ends[1] is not None
    ends[1].synchronize()
    assert not ends[0].query()


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_captured_teacher_gives_what_a_plain_one_gives(amp: str) -> None:
    plain = Bf16Chain(chain()) if amp == "bf16" else chain()
    graphed = GraphedChain(plain, cuda_capture(Lane(torch.device("cuda"))))
    found = [graphed.run(images(step), last=10, keep=(0, 3, 10)) for step in range(STEPS)]
    assert all(one._replay is not None for one in graphed._graphs.values()), "nothing was captured"
    for step, boundaries in enumerate(found):
        expected = plain.run(images(step), last=10, keep=(0, 3, 10))
        for boundary, tensor in expected.items():
            torch.testing.assert_close(boundaries[boundary], tensor, rtol=1e-3, atol=1e-3)


def test_the_resident_set_on_the_device_gives_the_batches_of_one_on_the_host() -> None:
    def dataset(device: str) -> Dataset:
        return opened(image_size=32, batch_size=64, device=torch.device(device))

    with dataset("cpu") as here, dataset("cuda") as there:
        for one, other in zip(here.train_batches(0, 5), there.train_batches(0, 5), strict=True):
            assert other.images.device.type == "cuda"
            assert other.images.stride() == one.images.stride()
            assert torch.equal(one.labels, other.labels.cpu())
            torch.testing.assert_close(other.images.cpu(), one.images, rtol=0.0, atol=1e-6)
