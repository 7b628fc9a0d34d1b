"""The choices that settings have: one enumeration a setting. Users type the member's name."""

from __future__ import annotations

from enum import Enum

# Settings with other values too: see outside.py.
BLOCK_LOSSES = ("normalized_mse", "mse")
OBJECTIVES = ("distillation", "entropy_temperature")

SCOPES = ("layer", "global")  # within which weights are compared that are to be zero


class Choice(Enum):
    """A setting's choices; a member reads as its name, also in an interpolation such as ${data.name}."""

    def __str__(self) -> str:
        return self.name


class Stage(Choice):
    """How far a job goes."""

    all = "all"
    teacher = "teacher"
    plan = "plan"
    distill = "distill"
    deliver = "deliver"


class Device(Choice):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TeacherSource(Choice):
    cifar = "cifar"
    torchvision = "torchvision"
    timm = "timm"
    factory = "factory"


class DataName(Choice):
    digits = "digits"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    imagefolder = "imagefolder"
    hf = "hf"
    custom = "custom"


class AugmentName(Choice):
    none = "none"
    crop = "crop"
    crop_flip = "crop_flip"
    resized_crop_flip = "resized_crop_flip"


class Interpolation(Choice):
    auto = "auto"
    bilinear = "bilinear"
    bicubic = "bicubic"


class CropMode(Choice):
    auto = "auto"
    centre = "centre"
    squash = "squash"


class GranularityName(Choice):
    conv = "conv"
    residual = "residual"
    resolution = "resolution"
    modules = "modules"


RECIPES = (  # those of distill.recipes, which needs torch
    "separable", "separable_x2", "lowrank", "thin", "stream", "halved",
    "one_conv", "bottleneck", "inverted", "skip", "keep",
)  # fmt: skip

WITHOUT_WIDTHS = ("separable", "separable_x2", "one_conv", "skip", "keep")  # of those, the ones without an option align


class Init(Choice):
    """Where first weights come from: what flows into layers, their weights alone, or nothing."""

    data = "data"
    teacher = "teacher"
    random = "random"


class ActivationName(Choice):
    """What is in the place of ReLU in students."""

    keep = "keep"
    lma = "lma"


class OptimizerName(Choice):
    adam = "adam"
    sgd = "sgd"
    rmsprop = "rmsprop"


class Schedule(Choice):
    cosine = "cosine"
    constant = "constant"


class Amp(Choice):
    off = "off"
    bf16 = "bf16"


class TrainingAmp(Choice):
    auto = "auto"
    off = "off"
    bf16 = "bf16"


class Refine(Choice):
    """What happens between assembling and fine-tuning."""

    off = "off"
    progressive = "progressive"


class Order(Choice):
    """In which order blocks are refined."""

    bottom_up = "bottom_up"
    together = "together"


class Stop(Choice):
    steps = "steps"
    plateau = "plateau"


class Strategy(Choice):
    auto = "auto"
    broadcast = "broadcast"
    relay = "relay"
    replicate = "replicate"
    layerwise = "layerwise"
    serial = "serial"
    ddp = "ddp"


class Cost(Choice):
    measured = "measured"
    flops = "flops"


class WireDtype(Choice):
    fp32 = "fp32"
    bf16 = "bf16"


class BudgetName(Choice):
    """What may be budgeted: a field of search.budget each."""

    params = "params"
    flops = "flops"
    bytes = "bytes"
    memory = "memory"
    latency = "latency"


class RuntimeName(Choice):
    """What will run the student."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"
    torch = "torch"
    torch_compile = "torch_compile"


class Precision(Choice):
    """In which a runtime computes."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class Packed(Choice):
    """How values are kept in a packed file."""

    exact = "exact"
    int8 = "int8"


class DeployDevice(Choice):
    cpu = "cpu"
    cuda = "cuda"


class Cache(Choice):
    """Where the teacher's activations are kept once they have been computed."""

    off = "off"
    ram = "ram"
    disk = "disk"


# What is written beside the student's weights.
PROGRAMS = ("pt2", "onnx", "int8")
