"""How the images that a registry's weights expect become the settings of the data, and what a user's settings do."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config.choices import CropMode, Interpolation
from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.config.load import from_yaml, to_yaml
from distill.config.schema import JobConfig
from distill.data import decoding
from distill.data.decoding import Squaring
from distill.errors import ConfigError
from distill.job.data import open_data
from distill.job.teacher import _tell_preprocessing

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)


def of(*overrides: str, data: str = "imagefolder") -> JobConfig:
    return compose([f"data={data}", "data.root=/nowhere", *overrides])


def timm(name: str, *overrides: str, data: str = "imagefolder") -> JobConfig:
    pytest.importorskip("timm")
    return of("teacher=timm", f"teacher.name={name}", *overrides, data=data)


def test_torchvisions_weights_tell_their_sizes_and_filter() -> None:
    for name, weights, size, resize, interpolation in (
        ("resnet50", "DEFAULT", 224, 232, "bilinear"),
        ("resnet50", "IMAGENET1K_V1", 224, 256, "bilinear"),
        ("efficientnet_b0", "DEFAULT", 224, 256, "bicubic"),
        ("inception_v3", "DEFAULT", 299, 342, "bilinear"),
        ("resnet50", "/downloads/resnet50-11ad3fa6.pth", 224, 232, "bilinear"),
    ):
        config = of("teacher=torchvision", f"teacher.name={name}", f"teacher.weights={weights}")
        data = config.data
        assert (data.image_size, data.resize, data.interpolation.name) == (size, resize, interpolation)
        assert (config.mean, config.std, data.crop_mode) == (*IMAGENET, CropMode.centre)


def test_timms_description_is_taken_over_for_its_weights_and_for_a_file_of_them() -> None:
    for weights in ("DEFAULT", "/of/mine.pth"):
        config = timm("vit_base_patch16_224", f"teacher.weights={weights}")
        data = config.data
        assert (data.image_size, data.resize, data.interpolation) == (224, 248, Interpolation.bicubic)
        assert (config.mean, config.std) == HALF
    squashed = timm("convnext_tiny", "teacher.weights=in12k_ft_in1k_384").data
    assert (squashed.image_size, squashed.resize, squashed.crop_mode) == (384, 384, CropMode.squash)


def test_what_no_registry_tells_is_as_usual() -> None:
    for overrides in (
        [],
        ["teacher=resnet50", "teacher.weights=mine.pth"],
        ["teacher=resnet50", "teacher.weights=null"],
    ):
        config = of(*overrides)
        data = config.data
        assert (data.image_size, data.resize, data.interpolation) == (224, None, Interpolation.bilinear)
        assert (config.mean, config.std, data.crop_mode) == (*IMAGENET, CropMode.centre)


def test_settings_of_the_user_stand() -> None:
    config = of("teacher=resnet50", "data.image_size=112", "data.mean=[0,0,0]", "data.interpolation=bicubic")
    assert (config.data.image_size, config.data.interpolation) == (112, Interpolation.bicubic)
    assert (config.mean, config.std) == ([0.0] * 3, IMAGENET[1])
    assert config.data.resize == 116, "the share of the picture that is seen stays"
    assert of("teacher=resnet50", "teacher.mean=[0,0,0]").mean == [0.0] * 3
    with pytest.raises(ConfigError, match=r"data.resize: got 200; expected at least data.image_size=224"):
        of("teacher=resnet50", "data.resize=200")


def test_small_pictures_are_shown_whole() -> None:
    config = timm("resnet26", "teacher.fit.epochs=1", data="cifar10")
    assert (config.data.image_size, config.data.resize) == (32, None)


def test_what_was_taken_over_is_in_the_configuration_of_the_run_and_in_its_identity() -> None:
    config = timm("resnet26")
    assert from_yaml(to_yaml(config)) == config
    assert "interpolation: bicubic" in to_yaml(config)
    as_taken, as_set, otherwise = (
        identity(timm("resnet26", *overrides, data="digits"))
        for overrides in ([], ["data.interpolation=bicubic"], ["data.interpolation=bilinear"])
    )
    assert as_taken == as_set != otherwise


def test_what_was_taken_over_is_said_and_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _tell_preprocessing(of("teacher=resnet50"))
    assert "the central 224 pixels of the shorter side resized to 232 (bilinear), mean 0.485" in caplog.text
    assert "otherwise" not in caplog.text
    _tell_preprocessing(of("teacher=resnet50", "data.image_size=160", "data.std=[1,1,1]"))
    assert "prepared otherwise: data.image_size=160 data.resize=166 data.std=[1.0, 1.0, 1.0]" in caplog.text
    caplog.clear()
    _tell_preprocessing(compose([]))
    assert not caplog.text


@pytest.mark.parametrize("name", ["resnet5O", "???"])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_missing_name_is_told_as_a_misspelt_one_before_anything_is_done(source: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher.name.*(one of alexnet|a name from timm.list_models)") as caught:
        of(f"teacher={source}", f"teacher.name={name}")
    assert caught.value.setting == "teacher.name"


def test_a_network_of_a_registry_given_as_the_group_is_told_how_to_name_it() -> None:
    with pytest.raises(ConfigError, match=r"teacher=torchvision teacher\.name=resnet34, or teacher=timm"):
        compose(["teacher=resnet34"])
    with pytest.raises(ConfigError, match="got 'resnet05'; expected 'resnet50'"):
        compose(["teacher=resnet05"])


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions(squash: bool, interpolation: str) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import CenterCrop, Compose, Resize

    noise = np.random.default_rng(0).integers(0, 256, (61, 45, 3), dtype=np.uint8)
    picture, form = Image.fromarray(noise), Squaring(32, 37, interpolation, squash)
    sides = (37, 37) if squash else 37
    theirs = Compose([Resize(sides, InterpolationMode(interpolation)), CenterCrop(32)])(picture)
    for ours in (decoding.evaluation_view(picture, form), decoding.fit(picture, form)):
        assert np.array_equal(decoding.pixels(ours), decoding.pixels(theirs))


@pytest.mark.parametrize("limit", [0, 4], ids=["streamed", "in memory"])
def test_images_are_read_as_the_settings_say(tmp_path: Path, limit: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    for place in ("train/a/1.png", "train/a/2.png", "train/a/3.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"):
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(file)
    config = compose(
        [
            *("data=imagefolder", f"data.root={tmp_path}", "data.image_size=16", "data.resize=20", "data.batch_size=2"),
            *("data.interpolation=bicubic", "data.crop_mode=squash", "data.augment=none", "data.num_workers=0"),
            *(f"data.memory_limit_gib={limit}", "data.mean=[0,0,0]", "data.std=[1,1,1]"),
        ]
    )
    wanted = decoding.pixels(decoding.fit(Image.fromarray(noise), Squaring(16, 20, "bicubic", True)))
    with open_data(config, torch.device("cpu"), ranks_here=1) as dataset:
        assert dataset.evaluation_side == 20
        for batch in (dataset.train_batch(0), dataset.validation_batch(0), next(dataset.test_batches(2))):
            pixels = (batch.images[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
            assert np.array_equal(pixels.numpy(), wanted)
