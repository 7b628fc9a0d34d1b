"""Which settings, and which content of what they name, tell two jobs apart."""

import copy
import json
import os
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from distill import extensions
from distill.config import choices
from distill.config import fingerprint as rule
from distill.config.compose import compose
from distill.config.fingerprint import fingerprint, identity
from distill.config.reference import settings
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.storage import contents
from distill.storage.image_files import USUAL_TEST_SPLITS


@pytest.fixture(scope="module")
def default() -> JobConfig:
    return compose([])


def digits(config: JobConfig) -> str:
    return fingerprint(identity(config))


def edited(config: JobConfig, path: str, value: object) -> JobConfig:
    """A copy of the configuration with one setting replaced."""
    changed = copy.deepcopy(config)
    *sections, name = path.split(".")
    owner: Any = changed
    for section in sections:
        owner = getattr(owner, section)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    return changed


UNCHANGED = (
    ("launch.nproc_per_node", 4), ("launch.max_restarts", 3), ("launch.threads_per_rank", 2), ("run.name", "other"),
    ("run.dir", "/elsewhere"), ("plan.window", 9), ("plan.cost", choices.Cost.flops), ("plan.timeout_s", 9.0),
    ("device", choices.Device.cpu), ("stage", choices.Stage.plan), ("checkpoint.every", 7),
    ("data.root", "/elsewhere"), ("data.num_workers", 0), ("distill.log_every", 3), ("plan.teacher_ranks", 2),
    ("plan.strategy", choices.Strategy.auto), ("plan.strategy", choices.Strategy.relay),
    ("distill.cuda_graphs", False), ("refine.steps", 7),  # without a method
    ("deploy.packed", choices.Packed.int8),
)  # fmt: skip
CHANGED = (
    ("seed", 1), ("distill.lr", 1e-2), ("distill.steps", 7), ("distill.amp", choices.Amp.bf16), ("student.rank", 3),
    ("plan.wire_dtype", choices.WireDtype.bf16), ("data.batch_size", 3),
    ("blocks.exclude", ["a"]), ("teacher.options", {"width": 2}), ("finetune.epochs", 9),
    ("assemble.batchnorm_batches", 1), ("plan.strategy", choices.Strategy.ddp), ("teacher.amp", choices.Amp.bf16),
    ("plan.groups", True), ("refine.method", choices.Refine.progressive), ("finetune.sparsity", 0.5),
    ("finetune.fused_views", 2), ("finetune.feature_weight", 0.5),
)  # fmt: skip


@pytest.mark.parametrize(("path", "value"), UNCHANGED)
def test_unchanged_by_where_and_how_fast(default: JobConfig, path: str, value: object) -> None:
    changed = edited(default, path, value)
    assert changed != default
    assert digits(changed) == digits(default)


@pytest.mark.parametrize(("path", "value"), CHANGED)
def test_changed_by_what_is_computed(default: JobConfig, path: str, value: object) -> None:
    assert digits(edited(default, path, value)) != digits(default)


@pytest.mark.parametrize(
    ("name", "value"), [("sparsity_scope", "layer"), ("sparsity_begin", 0.2), ("sparsity_end", 0.7)]
)
def test_how_weights_become_zero_counts_where_some_do(default: JobConfig, name: str, value: object) -> None:
    sparse = edited(default, "finetune.sparsity", 0.5)
    assert digits(edited(default, f"finetune.{name}", value)) == digits(default)
    assert digits(edited(sparse, f"finetune.{name}", value)) != digits(sparse)


def test_a_file_of_weights_is_its_content_wherever_it_lies(default: JobConfig, tmp_path: Path) -> None:
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    first.write_bytes(b"these")
    second.write_bytes(b"these")

    def given(weights: str | Path) -> str:
        return digits(edited(default, "teacher.weights", str(weights)))

    before = given(first)
    assert given(second) == before != digits(default)
    first.write_bytes(b"those")
    assert given(first) != before
    first.write_bytes(b"these")
    assert given(first) == before
    with pytest.raises(ConfigError, match=r"teacher\.weights: got .*nowhere.pt.*a file that exists"):
        given(tmp_path / "nowhere.pt")


def test_published_weights_are_a_name_and_the_library_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DEFAULT").mkdir()
    facts = identity(compose(["teacher=resnet50"]))
    assert facts["teacher.weights"] in ("DEFAULT", "IMAGENET1K_V2")
    assert facts["teacher.source (version)"].startswith("torchvision ")


def image_set(root: Path, *classes: str, images: int = 3, content: bytes = b"pixels") -> JobConfig:
    """A folder of image files, which nobody decodes here, and the configuration that names it."""
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for image in range(images):
                (root / split / name / f"{image}.png").write_bytes(content + bytes([image]))
    return compose(["data=imagefolder", f"data.root={root}"])


def test_a_set_of_images_is_what_is_in_it(tmp_path: Path) -> None:
    config = image_set(tmp_path / "pets", "cat", "dog")
    before = digits(config)
    assert "6 images of 2 classes (cat, dog)" in identity(config)["data.root (training images)"]
    (tmp_path / "pets" / ".DS_Store").touch()
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").touch()
    assert digits(config) == before, "what is no image is not part of it"
    assert digits(image_set(tmp_path / "moved", "cat", "dog")) == before
    others = [
        image_set(tmp_path / "classes", "car", "bus"), image_set(tmp_path / "more", "cat", "dog", images=4),
        image_set(tmp_path / "sizes", "cat", "dog", content=b"larger pixels"),
        image_set(tmp_path / "pixels", "cat", "dog", content=b"pIxels"),
    ]  # fmt: skip
    assert len({before, *map(digits, others)}) == 5
    changed = tmp_path / "pets" / "val" / "cat" / "0.png"
    changed.rename(changed.with_name("9.png"))
    assert digits(config) != before, "the test images decide the figures that are given"
    changed.with_name("9.png").rename(changed)
    assert digits(config) == before
    with pytest.raises(ConfigError, match=r"data\.root: got .*nowhere.*an existing folder"):
        identity(compose(["data=imagefolder", f"data.root={tmp_path}/nowhere"]))


def test_a_parquet_set_is_its_files(tmp_path: Path) -> None:
    for folder, content in {"a": b"same", "b": b"same", "c": b"else"}.items():
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "train-0.parquet").write_bytes(content)
        (tmp_path / folder / "data" / "test-0.parquet").write_bytes(content)

    def of(place: str) -> str:
        return digits(compose(["data=hf", f"data.root={place}"]))

    assert of(f"{tmp_path}/a") == of(f"{tmp_path}/b") != of(f"{tmp_path}/c")
    files = [f"{tmp_path}/{folder}/data/train-0.parquet" for folder in "abc"]
    assert of(files[0]) == of(files[1]) != of(files[2])
    assert of("owner/set") != of("owner/other"), "on the hub it is a name"


def test_cifar_is_the_published_one_before_it_is_downloaded_and_after(tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for kind, (folder, files) in zip((CIFAR10, CIFAR100), contents.CIFAR.values(), strict=True):
        assert folder == kind.base_folder
        published = dict(kind.train_list + kind.test_list) | {kind.meta["filename"]: kind.meta["md5"]}
        assert files == published
    config = compose(["data=cifar10", f"data.root={tmp_path}"])
    before = digits(config)
    assert identity(config)["data.root"] == "as published"
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"others")
    assert digits(config) != before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read_is_left_to_be_counted_as_undecodable(tmp_path: Path) -> None:
    config = image_set(tmp_path, "cat", "dog")
    before = digits(config)
    (tmp_path / "train" / "cat" / "0.png").chmod(0)
    assert digits(config) != before


@pytest.mark.parametrize("split", USUAL_TEST_SPLITS)
def test_the_test_images_are_those_of_the_set(tmp_path: Path, split: str) -> None:
    config = image_set(tmp_path, "cat", "dog")
    (tmp_path / "val").rename(tmp_path / split)
    assert "6 images" in identity(config)["data.root (test images)"]


def test_a_large_set_is_read_in_part_and_what_took_long_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "WHOLE_FILES", 5)
    monkeypatch.setattr(contents, "SAMPLED_FILES", 2)
    monkeypatch.setattr(contents, "NOTED_BYTES", 1)
    config = image_set(tmp_path / "pets", "cat", "dog")
    before = digits(config)
    assert not (tmp_path / "cache").exists(), "what was just written may be written again within the clock's tick"
    monkeypatch.setattr(contents, "SETTLED_NS", -1)
    assert digits(config) == before
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2

    def refuse(*_: object) -> str:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(contents, "_digest_of", refuse)
        assert digits(config) == before
    image = tmp_path / "pets" / "train" / "cat" / "0.png"
    image.write_bytes(b"pIxels\0")
    assert digits(config) != before, "of the same name and size, but its times tell"
    for note in (tmp_path / "cache").rglob("*.json"):
        note.write_text("{")
    image.write_bytes(b"pixels\0")
    assert digits(config) == before


def test_a_factory_is_its_source_and_that_of_what_it_imports_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    sources = {
        "zoo/__init__.py": "", "zoo/nets.py": "import torch\nfrom . import layers\nfrom widths import WIDTH\n",
        "zoo/layers.py": "import json", "widths.py": "WIDTH = 8", "unused.py": "", "zoo/unused.py": "",
    }  # fmt: skip
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    given = ["teacher=custom", "teacher.factory=zoo.nets:net"]
    config = compose(given)
    assert config.teacher.folder == str(tmp_path)
    assert identity(config)["teacher.factory (source)"].startswith("widths, zoo, zoo.layers, zoo.nets; content ")
    before = digits(config)
    monkeypatch.chdir("/")
    assert digits(config) == before
    for name, source in sources.items():
        (tmp_path / name).write_text(source + "# edited")
        assert (digits(config) == before) == ("unused" in name), name
        (tmp_path / name).write_text(source)
    assert digits(config) == before
    (tmp_path / "zoo" / "layers.py").write_text("def broken(:")
    assert digits(config) != before, "importing it will say what is wrong"
    assert compose(["teacher=custom", "teacher.factory=torchvision.models:resnet18"]).teacher.folder is None


def test_a_factory_that_a_package_names_is_its_source_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = EntryPoints([EntryPoint("small", "nets:net", "distill.teachers")])
    monkeypatch.setattr(extensions, "entry_points", points.select)
    (tmp_path / "nets.py").write_text("")
    config = compose(["teacher=custom", "teacher.factory=small"])
    assert config.teacher.folder == str(tmp_path)
    assert identity(config)["teacher.factory (source)"].startswith("nets; content ")


def test_what_comes_from_outside_is_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import helping\n")
    (tmp_path / "helping.py").write_text("")
    config = compose(["distill.loss=mine:huber"])
    assert config.run.code == str(tmp_path)
    assert identity(config)["distill.loss (source)"].startswith("helping, mine; content ")
    before = digits(config)
    monkeypatch.chdir("/")
    assert digits(config) == before
    (tmp_path / "helping.py").write_text("# edited")
    assert digits(config) != before
    assert compose(["distill.loss=torch.nn.functional:l1_loss"]).run.code is None


def test_a_set_from_outside_is_its_source_its_options_and_what_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (
        "import torch\ndef images(train, level=0):\n return [(torch.full((3, 4, 4), level), 0)] * (4 if train else 2)\n"
    )
    (tmp_path / "own_images.py").write_text(source)

    def facts(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "path", [*sys.path])
        return identity(compose(["data=custom", "data.factory=own_images:images", *more]))

    first, brighter = facts("+data.options.level=0.0"), facts("+data.options.level=0.5")
    assert first["data.factory (training items)"].startswith("4 items, content ")
    assert first["data.factory (test items)"].startswith("2 items, content ")
    assert first["data.factory (source)"].startswith("own_images; content ")
    differing = {key for key in first if first[key] != brighter[key]}
    assert differing == {"data.options", "data.factory (training items)", "data.factory (test items)"}


def test_the_content_is_read_once_for_all_configurations_of_a_launch(
    default: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = image_set(tmp_path, "cat", "dog"), {}
    first = identity(config, seen)
    monkeypatch.setattr(rule, "describe_images", lambda _: pytest.fail("read again"))
    assert identity(edited(config, "seed", 5), seen) == first | {"seed": 5}


def test_the_demo_has_the_fingerprint_that_the_readme_shows(default: JobConfig) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    assert set(re.findall(r"outputs/demo/([0-9a-f]+)", readme)) == {digits(default)}


def test_is_sixteen_hexadecimal_digits(default: JobConfig) -> None:
    assert len(digits(default)) == 16
    assert int(digits(default), 16) >= 0


def test_identity_leaves_out_nothing_but_the_listed_settings(default: JobConfig) -> None:
    left_out = {path for path, *_ in settings()} - identity(default).keys()
    assert identity(default).keys() - {path for path, *_ in settings()} == {"results"}
    assert left_out
    absent = {path for path in left_out if path.startswith(("search.", "refine."))}  # there is none (test_searched.py)
    for path in left_out - {"cache.dtype", "data.exif_orientation"} - absent:
        named = {path, path.split(".")[0]} & rule._NOT_IN_FINGERPRINT
        assert named or path in dict(rule._NOT_IN_FINGERPRINT_AT), path


def test_a_cache_is_told_from_none_and_by_its_precision_but_not_by_its_place(default: JobConfig) -> None:
    def cached(**changes: object) -> str:
        config = edited(edited(default, "distill.views", 2), "teacher.cache", changes.pop("cache", choices.Cache.ram))
        for path, value in changes.items():
            config = edited(config, path.replace("__", "."), value)
        return digits(config)

    assert cached() == cached(cache=choices.Cache.disk) == cached(cache__dir="/x") == cached(cache__max_gib=1.0)
    off = choices.Cache.off
    different = {cached(), cached(cache__dtype=choices.WireDtype.bf16), cached(distill__views=3), cached(cache=off)}
    assert len(different | {digits(default)}) == 5
    assert cached(cache=off) == cached(cache=off, cache__dtype=choices.WireDtype.bf16)


def test_every_entry_left_out_of_the_fingerprint_is_a_setting_or_a_section() -> None:
    paths = {path for path, *_ in settings()}
    sections = {path.rpartition(".")[0] for path in paths}
    assert paths | sections >= rule._NOT_IN_FINGERPRINT


def test_a_setting_that_came_later_is_left_out_where_it_changes_nothing(default: JobConfig) -> None:
    defaults = {path: shown for path, _, shown, _ in settings()}
    before = edited(default, "finetune.amp", choices.TrainingAmp.off)  # its default may compute otherwise
    for path, value in rule._NOT_IN_FINGERPRINT_AT:
        empty = "{}"  # of a mapping, whose entries count in their order where value is a list
        assert defaults[path] in (value, json.dumps(value), "auto") or (value == [] and defaults[path] == empty)
        assert path not in identity(before)


def test_of_patterns_for_one_block_the_last_decides_and_so_their_order_is_told_apart(default: JobConfig) -> None:
    one = {"a*": {"recipe": "keep"}, "ab*": {"rank": 1}}
    other = dict(reversed(one.items()))
    found = {digits(edited(default, "student.per_block", mapping)) for mapping in (one, other, {})}
    assert len(found) == 3
    assert digits(edited(default, "student.per_block", {})) == digits(default)
