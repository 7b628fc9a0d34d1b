"""The schema, its one door, the command line in front of it, and the words of the errors a user can cause."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import schema
from distill.config.compose import compose, config_dir
from distill.config.fingerprint import fingerprint, identity
from distill.config.load import from_yaml, to_yaml
from distill.config.reference import settings
from distill.config.schema import JobConfig
from distill.errors import ConfigError

CONF = Path(config_dir())
GROUPS = ("teacher", "data", "student", "refine", "activation", "launch", "experiment")
# What a choice needs besides its own file: the settings that only the user knows.
NEEDED = {
    "teacher/torchvision": ["teacher.name=resnet18"],
    "teacher/timm": ["teacher.name=resnet26"],
    "teacher/custom": ["teacher.factory=package.module:function"],
    "data/imagefolder": ["data.root=/images"],
    "data/hf": ["data.root=/images"],
    "data/custom": ["data.factory=package.module:function"],
    "experiment/cifar10_resnet20": ["data.root=/images"],
    "experiment/paper_resnet50_imagenet": ["data.root=/images"],
    "experiment/slim_cifar10": ["data.root=/images"],
}


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


ALL_CHOICES = [f"{group}/{choice}" for group in GROUPS for choice in choices(group)]


def combinations() -> list[tuple[str, ...]]:
    """Choices of every group side by side, so that each is composed at least once in as few configurations as can be:
    a composition takes a tenth of a second. An experiment brings its own choices of the other groups."""
    columns = [[f"{group}/{choice}" for choice in choices(group)] for group in GROUPS if group != "experiment"]
    count = max(map(len, columns))
    side_by_side = [tuple(column[index % len(column)] for column in columns) for index in range(count)]
    return side_by_side + [(f"experiment/{choice}",) for choice in choices("experiment")]


COMBINATIONS = combinations()


@pytest.fixture(scope="module")
def default() -> JobConfig:
    return compose([])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


class TestChoices:
    def test_there_are_choices_of_every_group_and_no_group_is_forgotten_here(self) -> None:
        assert {file.parent.name for file in CONF.rglob("*.yaml")} == {*GROUPS, CONF.name}
        for group in GROUPS:
            assert len(choices(group)) > 0
        assert set(NEEDED) <= set(ALL_CHOICES)

    @pytest.mark.parametrize("chosen", COMBINATIONS, ids="+".join)
    def test_every_choice_composes_and_loads(self, chosen: tuple[str, ...]) -> None:
        needed = {setting for choice in chosen for setting in NEEDED.get(choice, [])}
        config = compose([choice.replace("/", "=") for choice in chosen] + sorted(needed))
        assert isinstance(config, JobConfig)
        assert config.run.name

    def test_a_run_is_named_after_its_choices_or_by_its_experiment(self) -> None:
        assert compose([]).run.name == "cifar_resnet20-digits-separable"
        assert compose(["data=cifar10", "student=separable_x2"]).run.name == "cifar_resnet20-cifar10-separable_x2"
        assert compose(["experiment=cifar10_resnet20", "data.root=/images"]).run.name == "cifar10_resnet20"
        assert compose(["experiment=paper_vgg16_cifar10", "run.name=mine"]).run.name == "mine"

    def test_no_choice_is_left_out_of_the_combinations(self) -> None:
        assert {choice for chosen in COMBINATIONS for choice in chosen} == set(ALL_CHOICES)

    @pytest.mark.parametrize("needy", sorted(NEEDED))
    def test_a_choice_that_needs_a_value_says_which(self, needy: str) -> None:
        group, choice = needy.split("/")
        setting = NEEDED[needy][0].partition("=")[0]
        assert refusal(f"{group}={choice}").startswith(f"{setting}: got ")

    def test_a_choice_file_sets_only_settings_of_its_own_section(self) -> None:
        known = {path for path, *_ in settings()}
        for group in ("teacher", "data", "student"):
            for choice in choices(group):
                keys = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
                assert {f"{group}.{key}" for key in keys} <= known


class TestMisspelling:
    @pytest.mark.parametrize(
        ("typed", "named", "nearest"),
        [
            ("sed", "sed", "seed"),
            ("+sed", "sed", "seed"),
            ("distil.lr", "distil", "distill"),
            ("distill.lrr", "distill.lrr", "distill.lr"),
            ("+distill.lrr", "distill.lrr", "distill.lr"),
            ("++teacher.fit.lrr", "teacher.fit.lrr", "teacher.fit.lr"),
        ],
    )
    def test_misspelt_setting_is_refused_and_the_nearest_named(self, typed: str, named: str, nearest: str) -> None:
        message = refusal(f"{typed}=1")
        assert message.startswith(f"{named}: this setting does not exist; expected {nearest!r} (the nearest)")

    def test_settings_of_the_same_section_are_listed(self) -> None:
        message = refusal("student.renk=3")
        assert all(path in message for path, *_ in settings() if path.startswith("student."))
        assert "distill.lr" not in message

    def test_unknown_setting_in_a_file_is_refused(self, default: JobConfig) -> None:
        with pytest.raises(
            ConfigError, match=r"distill\.lrr: this setting does not exist; expected 'distill\.lr' \(the nearest\)"
        ):
            from_yaml(to_yaml(default).replace("  lr: null", "  lrr: null"))

    @pytest.mark.parametrize(
        ("typed", "nearest"),
        [("teacher=resnet51", "resnet50"), ("data=cifar11", "cifar10"), ("student=separabel", "separable")],
    )
    def test_unknown_choice_of_a_group_is_refused_and_all_are_listed(self, typed: str, nearest: str) -> None:
        group, _, given = typed.partition("=")
        message = refusal(typed)
        assert message.startswith(f"{group}: got {given!r}; expected {nearest!r} (the nearest)")
        assert all(choice in message for choice in choices(group))

    def test_unknown_experiment_is_refused_and_all_are_listed(self) -> None:
        message = refusal("experiment=nope")
        assert message.startswith("experiment: got 'nope'")
        assert all(choice in message for choice in choices("experiment"))

    def test_a_section_given_one_value_names_its_settings(self) -> None:
        message = refusal("plan=relay")
        assert message.startswith("plan: got 'relay'; expected its settings one by one: plan.strategy, plan.cost")

    @pytest.mark.parametrize("sign", ["", "+", "++"])
    def test_new_keys_of_mappings_need_no_plus_sign_and_may_have_one(self, sign: str) -> None:
        config = compose([f"{sign}teacher.options.width=2", f"{sign}student.options.rank=3"])
        assert (config.teacher.options, config.student.options) == ({"width": 2}, {"rank": 3})

    def test_patterns_of_blocks_are_keys_as_they_are_typed(self) -> None:
        per_block = compose(["student.per_block={layer1.*: {recipe: keep}, layer2.0: {rank: 1}}"]).student.per_block
        assert per_block == {"layer1.*": {"recipe": "keep"}, "layer2.0": {"rank": 1}}


class TestWrongType:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed=abc", "seed: got 'abc'; expected an integer"),
            ("distill.steps=1.5", "distill.steps: got '1.5'; expected an integer, or null"),
            ("finetune.weight_decay=null", "finetune.weight_decay: got 'null'; expected a number"),
            ("distill.lr=fast", "distill.lr: got 'fast'; expected a number, or null"),
            ("data.download=maybe", "data.download: got 'maybe'; expected true or false"),
            ("data.mean=grey", "data.mean: got 'grey'; expected a list of numbers, such as [1,2,3], or null"),
            (
                "teacher.mean=[a,b,c]",
                "teacher.mean: got '[a,b,c]'; expected a list of numbers, such as [1,2,3], or null",
            ),
            ("blocks.include=layer1", "blocks.include: got 'layer1'; expected a list, such as [a,b]"),
        ],
    )
    def test_value_of_the_wrong_type_is_quoted(self, override: str, message: str) -> None:
        assert refusal(override) == message

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("distill.optimizer=adm", "expected 'adam' (the nearest), or one of adam, sgd, rmsprop"),
            ("distill.amp=fp16", "expected 'bf16' (the nearest), or one of off, bf16"),
            (
                "distill.loss=msee",
                "expected 'mse' (the nearest), or one of normalized_mse, mse; "
                'or "package.module:attribute", with one colon',
            ),
            ("plan.strategy=xyz", "expected one of auto, broadcast, relay, replicate, layerwise, serial, ddp"),
        ],
    )
    def test_unknown_enum_member_lists_the_members(self, override: str, message: str) -> None:
        setting, _, given = override.partition("=")
        assert refusal(override) == f"{setting}: got {given!r}; {message}"


def digits(**changes: Any) -> schema.DataConfig:
    return schema.DataConfig(name=schema.DataName.digits, image_size=16, **changes)


def images(name: str) -> schema.DataConfig:
    return schema.DataConfig(name=schema.DataName[name], image_size=32)


def named_teacher(**changes: Any) -> schema.TeacherConfig:
    return schema.TeacherConfig(source=schema.TeacherSource.cifar, name="cifar_resnet20", **changes)


def student(recipe: str = "separable", **changes: Any) -> schema.StudentConfig:
    return schema.StudentConfig(recipe=recipe, **changes)


class TestImpossibleValues:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: schema.DistillConfig(steps=-1), "distill.steps: got -1; expected a number >= 0"),
            (
                lambda: schema.DistillConfig(steps=None),
                "distill.steps: got None; expected a number of steps, or distill.epochs",
            ),
            (lambda: schema.DistillConfig(epochs=0.0), "distill.epochs: got 0.0; expected a number > 0"),
            (lambda: schema.DistillConfig(epochs=float("nan")), "distill.epochs: got nan; expected a number > 0"),
            (lambda: schema.DistillConfig(lr=-1.0), "distill.lr: got -1.0; expected a number >= 0"),
            (lambda: schema.DistillConfig(lr=float("nan")), "distill.lr: got nan; expected a number >= 0"),
            (lambda: schema.DistillConfig(clip_norm=0.0), "distill.clip_norm: got 0.0; expected a number > 0, or null"),
            (lambda: schema.DistillConfig(patience=0), "distill.patience: got 0; expected a number >= 1"),
            (lambda: schema.DistillConfig(min_delta=-1.0), "distill.min_delta: got -1.0; expected a number >= 0"),
            (lambda: schema.DistillConfig(log_every=0), "distill.log_every: got 0; expected a number >= 1"),
            (lambda: schema.FitConfig(lr=-1.0), "teacher.fit.lr: got -1.0; expected a number >= 0"),
            (lambda: digits(batch_size=0), "data.batch_size: got 0; expected a number >= 1"),
            (
                lambda: digits(validation_fraction=1.0),
                "data.validation_fraction: got 1.0; expected a number from 0.0 to 0.9",
            ),
            (lambda: digits(mean=[1.0, 2.0]), "data.mean: got [1.0, 2.0]; expected three numbers, one a channel"),
            (
                lambda: digits(std=[1.0, 0.0, 1.0]),
                "data.std: got [1.0, 0.0, 1.0]; expected numbers > 0: images are divided by them",
            ),
            (lambda: named_teacher(std=[1.0]), "teacher.std: got [1.0]; expected three numbers, one a channel"),
            (lambda: schema.DeployConfig(batch=0), "deploy.batch: got 0; expected a number >= 1"),
            (
                lambda: schema.DeployConfig(programs=["onxx"]),
                "deploy.programs: got 'onxx'; expected 'onnx' (the nearest), or one of pt2, onnx, int8",
            ),
            (
                lambda: schema.DeployConfig(programs=["int8"]),
                "deploy.programs: got ['int8']; expected onnx too where int8 is asked for, which is made of it",
            ),
            (lambda: schema.PlanConfig(window=1), "plan.window: got 1; expected a number >= 2"),
            (lambda: schema.PlanConfig(link_gbit=0.0), "plan.link_gbit: got 0.0; expected a number > 0, or null"),
            (lambda: schema.PlanConfig(timeout_s=float("inf")), "plan.timeout_s: got inf; expected a number >= 1"),
            (lambda: student(rank=0), "student.rank: got 0; expected a number >= 1"),
            (
                lambda: student("separable_x2"),
                "student.init: got 'data'; expected random: separable_x2 has no initialisation from the teacher",
            ),
            (lambda: schema.CheckpointConfig(every=0), "checkpoint.every: got 0; expected a number >= 1"),
            (lambda: schema.FinetuneConfig(temperature=0.0), "finetune.temperature: got 0.0; expected a number > 0"),
            (
                lambda: schema.FinetuneConfig(soft_weight=2.0),
                "finetune.soft_weight: got 2.0; expected a number from 0.0 to 1.0",
            ),
            (
                lambda: schema.FinetuneConfig(sparsity=1.0),
                "finetune.sparsity: got 1.0; expected a share below 1: something has to be left",
            ),
            (
                lambda: schema.FinetuneConfig(sparsity=0.5, epochs=0),
                "finetune.sparsity: got 0.5; expected 0 with finetune.epochs=0: it is fine-tuning",
            ),
            (
                lambda: schema.FinetuneConfig(sparsity_scope="layers"),
                "finetune.sparsity_scope: got 'layers'; expected 'layer' (the nearest), or one of layer, global",
            ),
            (
                lambda: schema.FinetuneConfig(sparsity_end=0.1),
                "finetune.sparsity_end: got 0.1; expected a share above finetune.sparsity_begin=0.1",
            ),
            (
                lambda: schema.FinetuneConfig(objective="entropy_temperature", temperature=2.0),
                "finetune.temperature: got 2.0; expected none with finetune.objective=entropy_temperature, which has "
                "finetune.options.mu and k",
            ),
            (lambda: schema.FinetuneConfig(fused_views=0), "finetune.fused_views: got 0; expected a number >= 1"),
            (
                lambda: schema.FinetuneConfig(fused_views=2, soft_weight=0.0),
                "finetune.fused_views: got 2; expected 1 with finetune.soft_weight=0: nothing is made of the teacher's "
                "predictions",
            ),
            (
                lambda: schema.FinetuneConfig(fused_views=3, views=2),
                "finetune.fused_views: got 3; expected 1, or all of finetune.views=2, whose logits are known",
            ),
            (
                lambda: schema.FinetuneConfig(feature_weight=float("nan")),
                "finetune.feature_weight: got nan; expected a number >= 0",
            ),
            (lambda: schema.LaunchConfig(nproc_per_node=0), "launch.nproc_per_node: got 0; expected a number >= 1"),
            (
                lambda: schema.LaunchConfig(nnodes=2),
                "launch.rdzv_endpoint: got None; expected host:port of the first node",
            ),
            (
                lambda: schema.BlocksConfig(modules=["a"]),
                "blocks.modules: got ['a']; expected an empty list unless blocks.granularity=modules",
            ),
            (
                lambda: schema.BlocksConfig(granularity=schema.GranularityName.modules),
                "blocks.modules: got []; expected module paths",
            ),
            (lambda: images("cifar10"), "data.root: got None; expected the place of the images for data=cifar10"),
            (
                lambda: images("imagefolder"),
                "data.root: got None; expected the place of the images for data=imagefolder",
            ),
            (lambda: images("hf"), "data.root: got None; expected the place of the images for data=hf"),
            (lambda: images("custom"), "data.factory: got None; expected package.module:function for data=custom"),
            (lambda: digits(factory="a:b"), "data.factory: got 'a:b'; expected none with data=digits"),
            (
                lambda: schema.FinetuneConfig(options={"a": 1}),
                "finetune.options: got {'a': 1}; expected none with finetune.objective=distillation, which has "
                "finetune.temperature and soft_weight",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_impossible_value_is_refused(self, build: Callable[[], object], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            build()
        assert str(caught.value) == message
        assert caught.value.setting == message.partition(":")[0]

    def test_impossible_value_on_the_command_line_is_refused(self) -> None:
        assert refusal("plan.window=1") == "plan.window: got 1; expected a number >= 2"

    def test_settings_that_contradict_each_other_on_the_command_line_are_refused(self) -> None:
        message = refusal("student=separable_x2", "student.init=teacher")
        assert message.startswith("student.init: got 'teacher'; expected random")

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            ([], "teacher.cache: got 'ram'; expected off while every epoch is augmented afresh; or distill.views=N"),
            (["distill.views=2", "plan.strategy=relay"], "plan.strategy: got 'relay'; expected auto with"),
            (["data.augment=none", "plan.wire_dtype=bf16"], "plan.wire_dtype: got 'bf16'; expected fp32 with"),
            (["distill.views=0"], "distill.views: got 0; expected a number >= 1"),
            (["cache.max_gib=-1"], "cache.max_gib: got -1.0; expected a number >= 0"),
            (["teacher.cache=memory"], "teacher.cache: got 'memory'; expected one of off, ram, disk"),
            (
                ["teacher.cache=off", "cache.dtype=bf16"],
                "cache.dtype: got 'bf16'; expected fp32 with teacher.cache=off",
            ),
        ],
    )
    def test_a_cache_that_cannot_be_had_is_refused(self, overrides: list[str], words: str) -> None:
        assert refusal("teacher.cache=ram", *overrides).startswith(words)

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (
                ["plan.strategy=ddp"],
                "plan.strategy: got 'ddp'; expected no sharing of batches with distill.stop=plateau",
            ),
            (["plan.strategy=auto", "plan.groups=true"], "plan.groups: got True; expected no sharing of batches with"),
        ],
    )
    def test_ranks_that_share_a_batch_cannot_judge_a_plateau(self, overrides: list[str], words: str) -> None:
        assert refusal("distill.stop=plateau", *overrides).startswith(words)

    def test_the_smallest_possible_values_are_allowed(self) -> None:
        config = compose(["distill.steps=1", "distill.lr=0", "data.batch_size=1", "plan.window=2", "student.rank=1"])
        assert (config.distill.steps, config.distill.lr, config.plan.window) == (1, 0.0, 2)

    def test_module_paths_are_allowed_with_their_granularity(self) -> None:
        modules = schema.BlocksConfig(granularity=schema.GranularityName.modules, modules=["a", "b"]).modules
        assert modules == ["a", "b"]

    def test_a_set_that_is_embedded_needs_no_root(self) -> None:
        assert digits().root is None


class TestYaml:
    OVERRIDES = (
        "teacher=resnet50",
        "+teacher.options.zero_init_residual=true",
        "distill.amp=off",
        "distill.epochs=0.5",
    )

    def test_what_is_written_reads_back_equal(self) -> None:
        config = compose(self.OVERRIDES)
        assert config.distill.amp is schema.Amp.off  # a precision, and not YAML's truth value
        read = from_yaml(to_yaml(config))
        assert read == config
        assert fingerprint(identity(read)) == fingerprint(identity(config))

    def test_a_missing_section_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"^teacher"):
            from_yaml("seed: 1\n")

    def test_written_yaml_holds_every_setting(self, default: JobConfig) -> None:
        def leaves(prefix: str, value: object) -> set[str]:
            if isinstance(value, dict) and prefix not in schema.MAPPINGS:
                return {leaf for key, item in value.items() for leaf in leaves(f"{prefix}.{key}".lstrip("."), item)}
            return {prefix}

        assert leaves("", yaml.safe_load(to_yaml(default))) == {path for path, *_ in settings()}


class TestReference:
    def test_every_setting_has_an_explanation(self) -> None:
        rows = settings()
        assert len(rows) > 50
        assert all(explanation.strip() for _, _, _, explanation in rows)

    def test_defaults_shown_are_the_defaults(self, default: JobConfig) -> None:
        rows = {path: shown for path, _, shown, _ in settings()}
        assert rows["distill.lr"] == "null"
        assert rows["finetune.temperature"] == "4.0"
        assert rows["distill.optimizer"] == "adam"
        assert rows["distill.epochs"] == "null"
        assert rows["teacher.name"] == "from its group"
        assert default.distill.lr is None
        assert default.finetune.temperature == 4.0
