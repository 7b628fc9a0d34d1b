"""Kernels of a step, counted by running it without memory: bytes and units by hand, FLOPs as a real run counts them."""

from functools import partial

import pytest
import torch

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.blocks import cut_blocks
from distill.job.simulate import imagined_costs
from distill.job.trainers import trainer_options
from distill.planning.costs import Span
from distill.planning.unit import Unit
from distill.profiling.block_costs import flop_costs
from distill.simulation.hardware import Device, Operation, load_device
from distill.simulation.operations import Recorder
from distill.teachers import build_architecture
from distill.training.trainer import BlockTrainer

META, CPU = torch.device("meta"), torch.device("cpu")
SMALL = ["data.image_size=16", "data.batch_size=4"]  # the default teacher is the ResNet-20 of CIFAR

# One FLOP/s and nothing else costs anything: its seconds are FLOPs.
COUNTER = Device(
    title="counter", source="none", peak_flops={"fp32": 1.0, "tf32": 1.0, "bf16": 1.0}, memory_bytes_per_s=1e30,
    memory_bytes=1e9, board_watts=1.0, idle_watts=1.0, compute_share=1.0, memory_share=1.0, launch_s=0.0,
    busy_share=1.0,
)  # fmt: skip


def test_a_kernel_reads_its_inputs_and_writes_its_outputs() -> None:
    images = torch.empty(2, 4, 8, 8, device="meta")
    with Recorder() as recorder:
        torch.relu(images)
    assert recorder.operations == [Operation(0, 2 * images.nbytes)]


def test_a_convolution_also_reads_its_weights_and_runs_on_tensor_cores_unless_it_is_depthwise() -> None:
    images = torch.empty(2, 4, 8, 8, device="meta")
    dense = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False, device="meta")
    depthwise = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, device="meta")
    with Recorder() as recorder:
        dense(images)
        depthwise(images)
        dense.bfloat16()(images.bfloat16())
    first, second, third = (one for one in recorder.operations if one.flops)
    pixels = 2 * 8 * 8
    assert first == Operation(2 * 9 * 4 * 6 * pixels, 4 * (4 * pixels + 9 * 4 * 6 + 6 * pixels), "tf32")
    assert second == Operation(2 * 9 * 4 * pixels, 4 * (4 * pixels + 9 * 4 + 4 * pixels), "fp32")
    assert (third.flops, third.moved_bytes, third.precision) == (first.flops, first.moved_bytes / 2, "bf16")


def test_views_and_new_memory_are_no_kernels() -> None:
    images = torch.empty(2, 4, 8, 8, device="meta")
    with Recorder() as recorder:
        torch.empty_like(images[:, :2].flatten(1).detach())
    assert recorder.operations == []


def test_an_optimizers_update_reads_and_writes_its_state() -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(100)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    update = recorder.operations[-1]
    # weight, gradient and two moments are read, weight and moments written; a step counter of four bytes comes along
    assert update.moved_bytes == pytest.approx(4 * 100 * (4 + 3), abs=4 * 100 + 16)


@pytest.mark.parametrize("extra", [["student=separable_x2"], ["blocks.granularity=modules", "blocks.modules=[layer2]"]])
def test_an_imagined_job_has_the_flops_of_a_real_one(extra: list[str]) -> None:
    overrides = [*SMALL, *extra]
    found, spans = imagined_costs(overrides, COUNTER)
    config = compose(overrides)
    teacher = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    blocks = cut_blocks(config, (3, 16, 16), teacher, CPU)
    assert spans == [Span(block, 0, 200) for block in blocks.candidates]

    def trainer(block: int) -> BlockTrainer:
        module = blocks.build(block, torch.Generator().manual_seed(0))
        return BlockTrainer(Unit.of_block(block, "b"), module, budget=9, device=CPU, options=trainer_options(config))

    students = {Unit.of_block(block, "b"): partial(trainer, block) for block in blocks.candidates}
    real = flop_costs(blocks.chain, students, torch.zeros(4, 3, 16, 16))
    assert found.teacher_s == real.teacher
    assert found.student_s == real.student
    assert found.boundary_bytes == tuple(boundary.nbytes for boundary in blocks.chain.boundaries)


def test_half_precision_moves_fewer_bytes_and_is_faster_where_there_is_a_unit_for_it() -> None:
    device = load_device("h100")
    big = ["data.image_size=32", "data.batch_size=1024"]
    plain, _ = imagined_costs(big, device)
    half, _ = imagined_costs([*big, "distill.amp=bf16"], device)
    assert sum(half.student_s) < sum(plain.student_s)
    assert half.teacher_s == plain.teacher_s


def test_batches_cost_in_proportion_once_they_are_large() -> None:
    device = load_device("a100")
    (few, _), (many, _) = (imagined_costs(["data.image_size=32", f"data.batch_size={n}"], device) for n in (1024, 4096))
    assert 3 < sum(many.student_s) / sum(few.student_s) <= 4


def test_epochs_have_no_length_without_data() -> None:
    with pytest.raises(ConfigError, match=r"distill\.epochs: got 2\.0; expected --steps N"):
        imagined_costs([*SMALL, "distill.epochs=2"], COUNTER)
    _, spans = imagined_costs([*SMALL, "distill.epochs=2"], COUNTER, steps=7)
    assert {span.budget for span in spans} == {7}
