"""The schema of a job: one dataclass a section, with the checks of its values. Knows no torch.

Every setting carries its one-line explanation; docs/configuration.md is generated from them. To find a setting, look
for its section; its choices are in choices.py. All sections stay in one file, longer than others: this is what can be
set.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from distill.config.choices import (
    BLOCK_LOSSES,
    OBJECTIVES,
    PROGRAMS,
    RECIPES,
    SCOPES,
    ActivationName,
    Amp,
    AugmentName,
    BudgetName,
    Cache,
    Cost,
    CropMode,
    DataName,
    DeployDevice,
    Device,
    GranularityName,
    Init,
    Interpolation,
    OptimizerName,
    Order,
    Packed,
    Precision,
    Refine,
    RuntimeName,
    Schedule,
    Stage,
    Stop,
    Strategy,
    TeacherSource,
    TrainingAmp,
    WireDtype,
)  # fmt: skip
from distill.config.outside import DATA, LOSS, OBJECTIVE, RECIPE
from distill.config.settings import at_least, between, setting
from distill.errors import ConfigError, one_of
from distill.planning import plan as planning
from distill.planning.plan import STRATEGIES
from distill.search.budgets import UNITS, Budget, parse

USUAL_TEMPERATURE = 4.0


@dataclass(kw_only=True)
class FitConfig:
    epochs: float | None = setting(None, "epochs of training on the data; null: 12 without teacher.weights, else 0")
    lr: float = setting(0.1, "peak learning rate (SGD, Nesterov momentum 0.9, one warm-up epoch, cosine)")
    weight_decay: float = setting(5e-4, "weight decay")

    def __post_init__(self) -> None:
        at_least("teacher.fit", self, epochs=0, lr=0, weight_decay=0)


@dataclass(kw_only=True)
class TeacherConfig:
    source: TeacherSource = setting(MISSING, "where the architecture comes from")
    name: str = setting(MISSING, "the architecture's name within its source, for example resnet50")
    weights: str | None = setting(None, "a weights file (safetensors or torch), DEFAULT or another published name")
    factory: str | None = setting(None, "package.module:function that returns the network (source factory)")
    folder: str | None = setting(None, "folder that teacher.factory is imported from; null: as Python finds it here")
    options: dict[str, Any] = setting({}, "further keyword arguments of the architecture")
    mean: list[float] | None = setting(None, "input mean per channel that a file of weights expects; null: data.mean")
    std: list[float] | None = setting(None, "input standard deviation per channel; null: data.std")
    amp: Amp = setting(Amp.off, "precision of the teacher and of the activations that it gives to students")
    fit: FitConfig = field(default_factory=FitConfig)
    cache: Cache = setting(Cache.off, "keep its activations, recorded once before blocks train (docs/cache.md)")

    def __post_init__(self) -> None:
        if self.source is TeacherSource.factory and not self.factory:
            raise ConfigError("teacher.factory", self.factory, "package.module:function for teacher=custom")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise ConfigError(f"teacher.{name}", values, "three numbers, one a channel")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError("teacher.std", self.std, "numbers > 0: images are divided by them")

    @property
    def fit_epochs(self) -> float:
        """Epochs of teacher training that this configuration asks for."""
        if self.fit.epochs is not None:
            return self.fit.epochs
        return 12 if self.weights is None else 0


@dataclass(kw_only=True)
class DataConfig:
    name: DataName = setting(MISSING, "which kind of data")
    root: str | None = setting(None, "folder, parquet file or hub name")
    factory: str | None = setting(None, "package.module:function that returns the data set (name custom)")
    options: dict[str, Any] = setting({}, "further keyword arguments of data.factory")
    image_size: int | None = setting(
        None, "height and width of the teacher's input, in pixels; null: the published weights', else 224"
    )
    resize: int | None = setting(
        None,
        "what a picture's shorter side is resized to before the central image_size is taken; null: as the published "
        "weights were tested, else image_size in memory, 256/224 of it streamed",
    )
    interpolation: Interpolation = setting(
        Interpolation.auto, "of resizing; auto: the published weights', else bilinear"
    )
    crop_mode: CropMode = setting(
        CropMode.auto, "squash resizes both sides, centre keeps their ratio; auto: the published weights', else centre"
    )
    batch_size: int = setting(128, "images in a batch, the same for every block")
    augment: AugmentName = setting(AugmentName.none, "augmentation of the training images")
    validation_fraction: float = setting(0.05, "share of the training images held out for the job's own decisions")
    mean: list[float] | None = setting(
        None, "input mean per channel, of images in 0..1; null: the published weights', else ImageNet's"
    )
    std: list[float] | None = setting(None, "input standard deviation per channel; null: as for the mean")
    num_workers: int | None = setting(
        None,
        "decoding processes per reading rank, of streamed sets; null: its share of the cores, at most 8",
    )
    memory_limit_gib: float = setting(4.0, "a split larger than this (as uint8) is streamed instead of kept in memory")
    exif_orientation: bool = setting(True, "whether images are turned as their EXIF orientation says")
    max_bad_images: int = setting(10, "images that may be undecodable (they are named and skipped)")
    download: bool = setting(True, "whether missing data may be downloaded")
    train_split: str | None = setting(None, "name of the training split or folder; null: the usual one")
    test_split: str | None = setting(None, "name of the test split or folder; null: the usual one")
    image_column: str | None = setting(None, "image column of a parquet file; null: found by its type")
    label_column: str | None = setting(None, "label column of a parquet file; null: found by its type")

    @property
    def side(self) -> int:
        """The image size, which load() fills in where it is left open."""
        assert self.image_size is not None
        return self.image_size

    def __post_init__(self) -> None:
        at_least(
            "data", self, image_size=1, resize=1, batch_size=1, num_workers=0, memory_limit_gib=0, max_bad_images=0
        )
        between("data", self, 0.0, 0.9, "validation_fraction")
        self._check_custom()
        if self.root is None and self.name not in (DataName.digits, DataName.custom):
            raise ConfigError("data.root", None, f"the place of the images for data={self.name.name}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise ConfigError(f"data.{name}", values, "three numbers, one a channel")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError("data.std", self.std, "numbers > 0: images are divided by them")

    def _check_custom(self) -> None:
        custom = self.name is DataName.custom
        if not custom:
            for name in ("factory", "options"):
                if getattr(self, name):
                    raise ConfigError(f"data.{name}", getattr(self, name), f"none with data={self.name.name}")
            return
        if not self.factory:
            raise ConfigError("data.factory", self.factory, "package.module:function for data=custom")
        DATA.check(self.factory)
        if self.root is not None:
            raise ConfigError("data.root", self.root, "null with data=custom; data.options.root=DIR is an argument")
        if self.augment is AugmentName.resized_crop_flip:
            raise ConfigError("data.augment", "resized_crop_flip", "none, crop or crop_flip of data.factory's items")


# Settings whose values are mappings.
MAPPINGS = ("teacher.options", "data.options", "student.options", "student.per_block", "finetune.options")


@dataclass(kw_only=True)
class StudentConfig:
    recipe: str = setting(
        MISSING, f"how a student block is made: {', '.join(RECIPES)}, an entry point's name, or package.module:Class"
    )
    rank: int | None = setting(
        None,
        "the recipe's option rank: depthwise filters a channel, or channels between factors; null: its own default",
    )
    init: Init = setting(
        Init.data, "the recipe's option init: from the teacher's weights and data, from its weights alone, or random"
    )
    align: int | None = setting(
        None,
        "the recipe's option align: what widths and ranks are multiples of; null: 16 with AVX-512 or GPUs, else 8",
    )
    options: dict[str, Any] = setting({}, "the recipe's options by name (docs/networks.md lists them)")
    per_block: dict[str, Any] = setting(
        {}, "pattern of block names -> {recipe: NAME, OPTION: VALUE}, where it is another one; the last match counts"
    )
    first_layer: bool = setting(False, "whether the network's first convolution is replaced too")
    statistics_batches: int = setting(
        8, "training batches over which the statistics of layers' inputs are gathered that first weights need"
    )

    def __post_init__(self) -> None:
        at_least("student", self, rank=1, align=1, statistics_batches=1)
        RECIPE.check(self.recipe)
        if self.recipe == "separable_x2" and self.init is not Init.random:
            allowed = "random: separable_x2 has no initialisation from the teacher"
            raise ConfigError("student.init", self.init.name, allowed)


@dataclass(kw_only=True)
class ActivationConfig:
    name: ActivationName = setting(
        ActivationName.keep, "in the place of ReLU in blocks that change: keep, or lma (light multi-segment activation)"
    )


@dataclass(kw_only=True)
class BudgetConfig:
    params: Any = setting(None, "most parameters of the student: a share of the teacher's (0.3) or a number (100k)")
    flops: Any = setting(None, "most FLOPs of an image, two a multiply-add: a share (0.3) or an amount (20MFLOPs)")
    bytes: Any = setting(None, "most bytes of weights and batch norms: a share (0.3) or an amount (500kB)")
    memory: Any = setting(
        None, "most bytes of weights and live activations of a call on deploy.batch images: a share or an amount (3MiB)"
    )
    latency: Any = setting(
        None, "longest call on deploy.batch images, in deploy.runtime: a share (0.3) or an amount (3ms)"
    )

    def __post_init__(self) -> None:
        self.given()

    def given(self) -> dict[str, Budget]:
        """Return the budgets that are given, by name."""
        values = {name: getattr(self, name) for name in UNITS}
        return {name: parse(name, value) for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class SearchConfig:
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    sweep: BudgetName | None = setting(None, "the budget that search.budgets are values of")
    budgets: list[Any] = setting([], "several budgets, each a job of its own that takes the candidates from the first")
    candidates: list[Any] = setting(
        [], "what blocks may become: {recipe: NAME, OPTION: VALUE, blocks: PATTERN}; empty: the default pool"
    )
    images: int = setting(256, "validation images on which every candidate is scored in its block's place")
    steps: int = setting(
        0, "steps that candidates which stay in the running are trained for before the choice, in three rounds; 0: none"
    )
    judged: int = setting(4, "choices that are put together, and judged by validation images as whole students")

    def __post_init__(self) -> None:
        at_least("search", self, images=1, judged=1, steps=0)
        if self.steps in (1, 2, 3):
            raise ConfigError("search.steps", self.steps, "0 (no training before the choice), or 4 or more")
        for number, entry in enumerate(self.candidates):
            self._check(f"search.candidates[{number}]", entry)
        if self.sweep is None:
            if self.budgets:
                raise ConfigError("search.sweep", None, f"{one_of(UNITS)} beside search.budgets={self.budgets}")
            return
        name = self.sweep.name
        if not self.budgets:
            raise ConfigError("search.budgets", [], f"a list such as [0.3,0.5] beside search.sweep={name}")
        if (value := getattr(self.budget, name)) is not None:
            allowed = f"null beside search.sweep={name}, whose values are search.budgets"
            raise ConfigError(f"search.budget.{name}", value, allowed)
        for value in self.budgets:
            parse(name, value)

    def _check(self, name: str, entry: Any) -> None:
        if not isinstance(entry, dict) or not isinstance(entry.get("recipe"), str):
            raise ConfigError(name, entry, "a mapping of a recipe and its options: {recipe: thin, ratio: 0.5}")
        RECIPE.check(entry["recipe"], f"{name}.recipe")
        if not isinstance(entry.get("blocks", "*"), str):
            raise ConfigError(f"{name}.blocks", entry["blocks"], "a pattern (as in a shell) of block names")

    @property
    def on(self) -> bool:
        """Whether recipes are chosen under budgets."""
        return bool(self.budget.given())


@dataclass(kw_only=True)
class BlocksConfig:
    granularity: GranularityName = setting(GranularityName.residual, "size of a block")
    modules: list[str] = setting(
        [], "with granularity modules: the blocks' module paths, or patterns of them, in order"
    )
    include: list[str] = setting(["*"], "patterns (as in a shell) of the block names that get a student")
    exclude: list[str] = setting([], "patterns of the block names that do not")

    def __post_init__(self) -> None:
        listed = self.granularity is GranularityName.modules
        if listed != bool(self.modules):
            allowed = "module paths" if listed else "an empty list unless blocks.granularity=modules"
            raise ConfigError("blocks.modules", self.modules, allowed)


@dataclass(kw_only=True)
class DistillConfig:
    steps: int | None = setting(200, "steps of every block (its budget); 0: first weights are what it gets")
    epochs: float | None = setting(None, "the budget in passes over the training data; it goes before distill.steps")
    views: int | None = setting(
        None, "fixed augmentations of every image that epochs take in turn while blocks train; null: always fresh ones"
    )
    loss: str = setting(
        "normalized_mse", f"a block's loss against the teacher's activation: {', '.join(BLOCK_LOSSES)}, or from outside"
    )
    optimizer: OptimizerName = setting(OptimizerName.adam, "a block's optimizer")
    lr: float | None = setting(
        None,
        "peak learning rate; null: with adam a share of a layer's first weights (docs/architecture.md), else 0.003",
    )
    momentum: float = setting(0.9, "momentum of sgd; the other optimizers do not use it")
    smoothing: float = setting(0.99, "rmsprop's decay of its running mean square; Keras has 0.9")
    weight_decay: float = setting(0.0, "weight decay")
    schedule: Schedule = setting(Schedule.cosine, "learning rate over a block's budget, after the warm-up")
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly")
    clip_norm: float | None = setting(None, "largest gradient norm of a block; null: no clipping")
    amp: Amp = setting(Amp.off, "precision of the students' forward and backward pass")
    stop: Stop = setting(Stop.steps, "steps: at the budget; plateau: also when the held-out loss stops falling")
    check_every: int = setting(100, "plateau: steps between two looks at the held-out loss")
    check_batches: int = setting(4, "plateau: held-out batches of one look")
    patience: int = setting(3, "plateau: looks without improvement after which a block stops")
    min_delta: float = setting(0.01, "plateau: smallest relative improvement that counts")
    cuda_graphs: bool = setting(True, "on CUDA: replay teacher and updates as CUDA graphs, blocks on several streams")
    log_every: int = setting(20, "steps between two readings of the losses")

    def __post_init__(self) -> None:
        LOSS.check(self.loss)
        if self.steps is None and self.epochs is None:
            raise ConfigError("distill.steps", self.steps, "a number of steps, or distill.epochs")
        at_least("distill", self, steps=0, lr=0, momentum=0, weight_decay=0, warmup_steps=0, check_every=1)
        at_least("distill", self, check_batches=1, patience=1, min_delta=0, log_every=1, views=1)
        between("distill", self, 0.0, 1.0, "smoothing")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError("distill.epochs", self.epochs, "a number > 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError("distill.clip_norm", self.clip_norm, "a number > 0, or null")


@dataclass(kw_only=True)
class PlanConfig:
    strategy: Strategy = setting(Strategy.broadcast, "which rank runs the teacher and which trains what")
    cost: Cost = setting(Cost.measured, "costs by timing every block here, or by counting FLOPs")
    teacher_ranks: int | None = setting(
        None, "broadcast: ranks that run the teacher, taking the batches in turn; null: as many as pay"
    )
    groups: bool = setting(
        False, "relay, auto: whether ranks may share a block's batch (results are then close, not bitwise equal)"
    )
    window: int = setting(4, "batches that a teacher rank may run ahead of a receiver")
    wire_dtype: WireDtype = setting(WireDtype.fp32, "precision of the activations that students are given")
    link_gbit: float | None = setting(
        None, "bandwidth of a host's link to the others in Gbit/s; null: probed with plan.cost=measured, else unlimited"
    )
    shared_memory: bool = setting(
        True,
        "whether ranks of one host pass activations, and statistics of batch norms, through memory; false: through "
        "sockets, if that makes trouble",
    )
    take_over: bool = setting(
        True, "whether a rank that runs dry takes blocks over from the busiest rank, where that saves time"
    )
    timeout_s: float = setting(600.0, "longest wait for a peer, in seconds")
    memory_gib: float | None = setting(
        None, "memory of a rank in GiB that a plan must fit in; null: the GPU's, or the host's divided by its ranks"
    )

    def __post_init__(self) -> None:
        at_least("plan", self, teacher_ranks=1, window=2, timeout_s=1)
        if self.teacher_ranks is not None and not self._understands("teacher_ranks"):
            raise ConfigError("plan.teacher_ranks", self.teacher_ranks, f"null with plan.strategy={self.strategy.name}")
        if self.groups and not self._understands("groups"):
            raise ConfigError("plan.groups", True, f"false with plan.strategy={self.strategy.name}")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigError("plan.memory_gib", self.memory_gib, "a number > 0, or null")
        if self.link_gbit is not None and not 0 < self.link_gbit < math.inf:
            raise ConfigError("plan.link_gbit", self.link_gbit, "a number > 0, or null")

    @property
    def strategies(self) -> list[planning.Strategy]:
        """What the plan is chosen from."""
        every = STRATEGIES.values() if self.strategy is Strategy.auto else [STRATEGIES[self.strategy.name]]
        asked = [one for one in every if one.automatic or self.strategy is not Strategy.auto]
        return [
            candidate
            for one in asked
            for candidate in one.configured(teacher_ranks=self.teacher_ranks, groups=self.groups)
        ]

    @property
    def shares_batches(self) -> bool:
        """Whether ranks may share the rows of a batch."""
        return any(one.shares_batches for one in self.strategies)

    def _understands(self, name: str) -> bool:
        return any(name in one.settings for one in self.strategies)


@dataclass(kw_only=True)
class CacheConfig:
    dtype: WireDtype = setting(WireDtype.fp32, "precision of recorded activations, and so of what students are given")
    max_gib: float = setting(8.0, "most that may be recorded, on each host")
    dir: str | None = setting(
        None, "folder of recorded files for several runs; null: the run directory, while it trains"
    )

    def __post_init__(self) -> None:
        at_least("cache", self, max_gib=0)


@dataclass(kw_only=True)
class AssembleConfig:
    batchnorm_batches: int = setting(50, "training batches over which batch-norm statistics are re-estimated")
    refit_images: int = setting(
        512,
        "training images by which layers are fitted, in closed form, to what they get in the student; kept if that "
        "helps; 0: none",
    )

    def __post_init__(self) -> None:
        at_least("assemble", self, batchnorm_batches=0, refit_images=0)


@dataclass(kw_only=True)
class RefineConfig:
    method: Refine = setting(
        Refine.off,
        "progressive: after assembling, blocks are trained on what they get in the student (docs/refining.md)",
    )
    order: Order = setting(
        Order.together, "together: all blocks in every step; bottom_up: one after another, with the teacher's above it"
    )
    steps: int = setting(100, "steps of every block")
    lr: float | None = setting(None, "peak learning rate, as finetune.lr; null: 0.02, less for fewer than 800 steps")
    whole_weight: float = setting(
        1.0, "weight of the whole network's loss (finetune.temperature, soft_weight) beside those of the blocks"
    )

    def __post_init__(self) -> None:
        at_least("refine", self, steps=1, lr=0, whole_weight=0)

    @property
    def on(self) -> bool:
        """Whether the assembled student is refined."""
        return self.method is not Refine.off


@dataclass(kw_only=True)
class FinetuneConfig:
    epochs: float = setting(2.0, "epochs of end-to-end distillation, the last in part if need be; 0 skips it")
    lr: float | None = setting(
        None, "peak learning rate (SGD, Nesterov momentum 0.9, cosine); null: 0.02, less for fewer than 800 steps"
    )
    weight_decay: float = setting(1e-4, "weight decay")
    objective: str = setting("distillation", f"what it is trained for: {', '.join(OBJECTIVES)}, or from outside")
    options: dict[str, Any] = setting(
        {}, "arguments of an objective from outside; of entropy_temperature: mu and k (docs/accuracy.md)"
    )
    temperature: float = setting(USUAL_TEMPERATURE, "temperature of the soft targets")
    soft_weight: float = setting(0.9, "weight of the soft targets; the labels get the rest")
    fused_views: int = setting(
        1, "augmentations of an image over which the teacher's prediction is averaged, each a pass of the teacher"
    )
    feature_weight: float = setting(
        0.0, "weight of the error of activations between blocks, which fades over the course; 0: none"
    )
    amp: TrainingAmp = setting(
        TrainingAmp.auto,
        "precision of passes; auto: bf16 where timed steps show it to be faster (docs/finetuning.md)",
    )
    views: int | None = setting(
        None,
        "fixed augmentations of every image, of which the teacher's logits are kept; null: fresh ones in every epoch",
    )
    ema: float | None = setting(
        None, "decay of a moving average of the weights, which is judged and delivered in their place; null: none"
    )
    patience: int | None = setting(
        None, "epochs in a row without a better one on validation images after which it ends; null: it never ends early"
    )
    sparsity: float = setting(0.0, "share of the weights that are zero in the end, of matrices and kernels; 0: none")
    sparsity_scope: str = setting(
        "global", "within which the smallest weights are chosen: layer (the same share of each) or global"
    )
    sparsity_begin: float = setting(0.1, "share of the steps after which weights become zero, more and more of them")
    sparsity_end: float = setting(0.6, "share of the steps after which all that are to be zero are")

    def __post_init__(self) -> None:
        OBJECTIVE.check(self.objective)
        if self.options and self.objective == "distillation":
            allowed = f"none with finetune.objective={self.objective}, which has finetune.temperature and soft_weight"
            raise ConfigError("finetune.options", self.options, allowed)
        if self.objective == "entropy_temperature" and self.temperature != USUAL_TEMPERATURE:
            allowed = "none with finetune.objective=entropy_temperature, which has finetune.options.mu and k"
            raise ConfigError("finetune.temperature", self.temperature, allowed)
        at_least("finetune", self, epochs=0, lr=0, weight_decay=0, fused_views=1, patience=1, views=1)
        if self.fused_views > 1 and self.soft_weight == 0:
            allowed = "1 with finetune.soft_weight=0: nothing is made of the teacher's predictions"
            raise ConfigError("finetune.fused_views", self.fused_views, allowed)
        if self.views is not None and self.fused_views not in (1, self.views):
            allowed = f"1, or all of finetune.views={self.views}, whose logits are known"
            raise ConfigError("finetune.fused_views", self.fused_views, allowed)
        if not 0 <= self.feature_weight < math.inf:
            raise ConfigError("finetune.feature_weight", self.feature_weight, "a number >= 0")
        between("finetune", self, 0.0, 1.0, "soft_weight")
        if not 0 < self.temperature < math.inf:
            raise ConfigError("finetune.temperature", self.temperature, "a number > 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError("finetune.ema", self.ema, "a number between 0 and 1, or null")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        between("finetune", self, 0.0, 1.0, "sparsity", "sparsity_begin", "sparsity_end")
        if self.sparsity == 1:
            raise ConfigError("finetune.sparsity", self.sparsity, "a share below 1: something has to be left")
        if self.sparsity > 0 and self.epochs == 0:
            raise ConfigError("finetune.sparsity", self.sparsity, "0 with finetune.epochs=0: it is fine-tuning")
        if self.sparsity_scope not in SCOPES:
            raise ConfigError("finetune.sparsity_scope", self.sparsity_scope, one_of(SCOPES, self.sparsity_scope))
        if self.sparsity_end <= self.sparsity_begin:
            allowed = f"a share above finetune.sparsity_begin={self.sparsity_begin:g}"
            raise ConfigError("finetune.sparsity_end", self.sparsity_end, allowed)


@dataclass(kw_only=True)
class TimeConfig:
    seconds: float | None = setting(
        None,
        "device seconds (of the clock, times ranks) of the whole command, which decide how long blocks and the whole "
        "student are trained, in the place of distill.steps and finetune.epochs (docs/budget.md)",
    )

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError("budget.seconds", self.seconds, "a number > 0, or null")


@dataclass(kw_only=True)
class DeployConfig:
    runtime: RuntimeName | None = setting(
        None,
        "what will run the student, in which its latency is measured; null: onnxruntime where installed, else torch",
    )
    device: DeployDevice = setting(DeployDevice.cpu, "where it will run; cuda: torch and torch_compile alone")
    threads: int = setting(1, "CPU threads of a call; one is measured best, and several calls at once use the others")
    batch: int = setting(64, "images of a call by which candidates are compared; 1 is measured too, and 64")
    precision: Precision = setting(Precision.fp32, "precision in which it will run (docs/latency.md)")
    programs: list[str] = setting(
        list(PROGRAMS), f"programs to write beside the weights, of {', '.join(PROGRAMS)} (docs/deploy.md)"
    )
    packed: Packed | None = setting(
        None,
        "write student.packed.safetensors, without zeros: exact values, or int8; null: exact with finetune.sparsity",
    )
    int8_steps: int = setting(
        50, "steps of training for INT8, of the blocks that lose most by it, where it takes over 0.3 points; 0: none"
    )
    table: str | None = setting(
        None, "the table that measure.py of a bundle wrote on another device, in the place of measuring here"
    )

    def __post_init__(self) -> None:
        at_least("deploy", self, threads=1, batch=1, int8_steps=0)
        for name in self.programs:
            if name not in PROGRAMS:
                raise ConfigError("deploy.programs", name, one_of(PROGRAMS, name))
        if "int8" in self.programs and "onnx" not in self.programs:
            raise ConfigError("deploy.programs", self.programs, "onnx too where int8 is asked for, which is made of it")


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = setting(200, "steps between two checkpoints of an unfinished block")

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=1)


@dataclass(kw_only=True)
class LaunchConfig:
    nproc_per_node: int = setting(1, "ranks on this node (python -m distill only; torchrun has its own option)")
    nnodes: int = setting(1, "nodes; run the same command on each")
    rdzv_endpoint: str | None = setting(None, "host:port of the first node, with nnodes > 1")
    rdzv_id: str = setting("distill", "name of the rendezvous, with nnodes > 1")
    rdzv_here: bool | None = setting(None, "whether the rendezvous is on this node; null: if the endpoint's host is it")
    local_addr: str | None = setting(None, "what other nodes can call this one; null: its own host name")
    max_restarts: int = setting(0, "restarts of the ranks after a failure")
    threads_per_rank: int | None = setting(
        None, "CPU threads of a rank; null: the cores that it may use, divided by the ranks of the node"
    )

    def __post_init__(self) -> None:
        at_least("launch", self, nproc_per_node=1, nnodes=1, max_restarts=0, threads_per_rank=1)
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError("launch.rdzv_endpoint", self.rdzv_endpoint, "host:port of the first node")


@dataclass(kw_only=True)
class RunConfig:
    name: str = setting(MISSING, "folder of this experiment under outputs/")
    dir: str | None = setting(None, "run directory; null: outputs/<run.name>/<fingerprint>, then -<run.tag> if given")
    tag: str | None = setting(None, "keeps runs apart that differ only in how they run; a sweep sets it where needed")
    code: str | None = setting(
        None, "folder that what comes from outside is imported from; null: as Python finds it here (docs/runs.md)"
    )

    def __post_init__(self) -> None:
        if self.dir is not None and re.search("[\ud800-\udfff]", self.dir):  # what Python makes of other bytes
            raise ConfigError("run.dir", self.dir, "a name in UTF-8, and a locale that has it (LC_ALL=C.UTF-8)")
        if self.tag is not None and not re.fullmatch(r"[A-Za-z0-9_.,+=-]+", self.tag):
            raise ConfigError("run.tag", self.tag, "letters, digits and _.,+=- only: it is part of a folder's name")


@dataclass(kw_only=True)
class JobConfig:
    stage: Stage = setting(
        Stage.all,
        "how far to go: to the trained teacher, the printed plan, the distilled blocks, or all; "
        "deliver writes the files of a finished run again",
    )
    seed: int = setting(0, "seed of everything random")
    device: Device = setting(Device.auto, "auto takes CUDA where there is one")
    teacher: TeacherConfig = MISSING
    data: DataConfig = MISSING
    student: StudentConfig = MISSING
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    budget: TimeConfig = field(default_factory=TimeConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    assemble: AssembleConfig = field(default_factory=AssembleConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def mean(self) -> list[float]:
        """What is subtracted from an input's channels."""
        mean = self.teacher.mean or self.data.mean
        assert mean is not None, "load() fills it in"
        return mean

    @property
    def std(self) -> list[float]:
        """What an input's channels are divided by."""
        std = self.teacher.std or self.data.std
        assert std is not None, "load() fills it in"
        return std

    def __post_init__(self) -> None:
        if self.search.on or self.search.budgets:
            self._check_searched()
        if self.finetune.fused_views > 1 and not self._varies:
            allowed = "1 with data.augment=none: an image looks the same every time"
            raise ConfigError("finetune.fused_views", self.finetune.fused_views, allowed)
        if self.distill.stop is Stop.plateau and self.plan.shares_batches:
            setting, value = ("plan.groups", True) if self.plan.groups else ("plan.strategy", self.plan.strategy.name)
            raise ConfigError(setting, value, "no sharing of batches with distill.stop=plateau: ranks could disagree")
        if self.teacher.cache is not Cache.off:
            self._check_cached()
        elif self.cache.dtype is not WireDtype.fp32:
            allowed = "fp32 with teacher.cache=off: nothing is recorded; plan.wire_dtype=bf16 rounds activations"
            raise ConfigError("cache.dtype", self.cache.dtype.name, allowed)

    @property
    def _varies(self) -> bool:
        """Whether training images may look otherwise in another epoch."""
        return self.data.augment is not AugmentName.none or self.data.name is DataName.custom

    def _check_searched(self) -> None:
        for name in ("options", "per_block"):
            if value := getattr(self.student, name):
                raise ConfigError(f"student.{name}", value, "none with a search.budget: say it in search.candidates")
        if self.data.validation_fraction == 0:
            allowed = "a share above 0 with a search.budget: candidates are scored on validation images"
            raise ConfigError("data.validation_fraction", 0.0, allowed)

    def _check_cached(self) -> None:
        cache = self.teacher.cache.name
        if self._varies and self.distill.views is None:
            allowed = "off while every epoch is augmented afresh; or distill.views=N, or data.augment=none"
            raise ConfigError("teacher.cache", cache, allowed)
        if self.plan.strategy not in (Strategy.broadcast, Strategy.auto):  # the default, and what leaves it open
            allowed = f"auto with teacher.cache={cache}: every rank reads what its blocks need"
            raise ConfigError("plan.strategy", self.plan.strategy.name, allowed)
        if self.plan.wire_dtype is not WireDtype.fp32:
            allowed = f"fp32 with teacher.cache={cache}: nothing is sent; cache.dtype=bf16 rounds activations"
            raise ConfigError("plan.wire_dtype", self.plan.wire_dtype.name, allowed)
