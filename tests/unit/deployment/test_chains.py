"""Differences of chains, the predictions made of them, and that nothing is timed twice: on made-up runtimes, and once
in ONNX Runtime."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.deployment.chains import LatencyTable
from distill.deployment.graphs import onnx_key, to_onnx, torch_key
from distill.deployment.measure import Call, Timing
from distill.deployment.runtimes import Runtime, Source, runtime_of
from distill.deployment.tables import KeptHere, MeasuredElsewhere
from distill.errors import ConfigError
from tests.unit.deployment.networks import Block, Network

ROOT = Path(__file__).parents[3]
NAMES = ["stem", "body.0", "body.1", "body.2", "head"]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Network(16, 16, 16).eval()


@pytest.fixture
def chain(teacher: nn.Module) -> Chain:
    return cut(copy.deepcopy(teacher), torch.zeros(2, 3, 8, 8), granularity=Granularity.residual)


@dataclass(frozen=True, kw_only=True)
class Counting(Runtime):
    """A runtime in which a convolution takes a millisecond for every 16 of its outputs, and fusing two that follow one
    another saves a tenth: costs at edges, which a block alone does not show."""

    name = "counting"
    precisions = ("fp32",)
    started: list[str] = field(default_factory=list)

    def source(self, module: nn.Module, sample: Tensor) -> Source:
        widths = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        return Source("+".join(map(str, widths)), 0.001 * sum(widths) / 16 - 0.0001 * (len(widths) - 1))

    def start(self, source: Source, sample: Tensor) -> Call:
        self.started.append(source.key)
        return lambda times: times * float(source.program)

    @property
    def environment(self) -> dict[str, Any]:  # type: ignore[override]
        return {"runtime": "counting", "threads": 1, "precision": "fp32"}


def table(chain: Chain, teacher: nn.Module, folder: Path, runtime: Runtime | None = None) -> LatencyTable:
    runtime = runtime or Counting()
    return LatencyTable(chain, teacher, runtime, batch=4, timings=KeptHere(runtime.environment, folder))


class TestDifferences:
    def test_a_chain_has_the_neighbours_where_there_are_some(
        self, chain: Chain, teacher: nn.Module, tmp_path: Path
    ) -> None:
        assert [block.name for block in chain.blocks] == NAMES
        places = table(chain, teacher, tmp_path)
        base, found = places.chains(2, {"narrow": Block(8)})
        assert (base.key, found["narrow"][0].key) == ("16+16+16+16+16+16", "16+16+8+16+16+16")
        assert places.chains(0, {})[0].key == "16+16+16"
        assert places.chains((1, 4), {"two": nn.Sequential(Block(), Block())})[1]["two"][0].key == "16+16+16+16+16"

    def test_they_are_what_the_network_takes_longer(self, chain: Chain, teacher: nn.Module, tmp_path: Path) -> None:
        places = table(chain, teacher, tmp_path)
        assert places.difference(2, Block(8)).median_ms == pytest.approx(-0.5)
        assert places.difference(1, nn.Identity()).median_ms == pytest.approx(-1.8)
        assert places.difference(1, Block()).median_ms == 0.0

    def test_they_add_up_to_the_student(self, chain: Chain, teacher: nn.Module, tmp_path: Path) -> None:
        places = table(chain, teacher, tmp_path)
        student = Network(8, 16, 4).eval()
        choices = {1: Block(8), 3: Block(4)}
        assert places.teacher.median_ms == pytest.approx(6.4)
        assert places.predict(choices) == pytest.approx(6.4 - 0.5 - 0.75)
        found = places.additivity(choices, student)
        assert found.measured_ms == pytest.approx(found.predicted_ms)
        assert found.error == pytest.approx(0, abs=1e-9)

    def test_what_does_not_add_up_is_told(self, chain: Chain, teacher: nn.Module, tmp_path: Path) -> None:
        places = table(chain, teacher, tmp_path)
        other = Network(8, 8, 8).eval()
        assert places.additivity({1: Block(8)}, other).error == pytest.approx(5.9 / 4.9 - 1)


class TestNothingIsTimedTwice:
    def test_alike_blocks_and_further_jobs_use_what_is_known(
        self, chain: Chain, teacher: nn.Module, tmp_path: Path
    ) -> None:
        runtime = Counting()
        places = table(chain, teacher, tmp_path, runtime)
        places.differences(2, {})
        chains = ["+".join(["16"] * length) for length in (7, 3, 5, 6, 4, 2)]
        assert runtime.started == chains, "the teacher, and its own chains in the same rounds"
        runtime.started.clear()
        found = places.differences(2, {"a": Block(8), "b": Block(4)})
        assert runtime.started == ["16+16+16+16+16+16", "16+16+8+16+16+16", "16+16+4+16+16+16"]
        again = table(chain, teacher, tmp_path, runtime)
        assert again.differences(2, {"a": Block(8), "b": Block(4), "same": Block()}) | found == found | {
            "same": places.difference(2, Block())
        }
        assert len(runtime.started) == 3

    def test_another_environment_or_batch_is_timed_for_itself(
        self, chain: Chain, teacher: nn.Module, tmp_path: Path
    ) -> None:
        here = KeptHere({"cpu": "one"}, tmp_path)
        here.put("k-b4", Timing(1.0, 1.0, 1.0, 0.0, 9))
        assert here.get("k-b4", "it") == KeptHere({"cpu": "one"}, tmp_path).get("k-b4", "it") != None  # noqa: E711
        assert KeptHere({"cpu": "other"}, tmp_path).get("k-b4", "it") is None
        assert here.get("k-b8", "it") is None

    def test_a_damaged_file_is_told_by_name_and_measured_again(
        self, chain: Chain, teacher: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = table(chain, teacher, tmp_path).difference(2, Block(8))
        (kept,) = tmp_path.rglob("16+16+8+*-over-16+16+16+16+16+16-b4.json")
        kept.write_text("{}")
        assert table(chain, teacher, tmp_path).difference(2, Block(8)) == expected
        assert str(kept) in caplog.text
        assert "measured again" in caplog.text

    def test_a_folder_that_cannot_be_written_costs_a_warning_alone(
        self, chain: Chain, teacher: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        places = table(chain, teacher, tmp_path / "file")
        assert places.difference(2, Block(8)).median_ms == pytest.approx(-0.5)
        assert "is not kept for other jobs" in caplog.text


class TestKeys:
    @pytest.mark.parametrize("key", ["onnx", "torch"])
    def test_names_and_weights_do_not_count_but_everything_else_does(self, key: str) -> None:
        def of(module: nn.Module, channels: int = 16, side: int = 8) -> str:
            sample, module = torch.zeros(2, channels, side, side), module.eval().requires_grad_(False)
            return onnx_key(to_onnx(module, sample)) if key == "onnx" else torch_key(module, sample)

        plain = of(nn.Sequential(Block(), nn.Sequential(Block())))
        assert plain == of(nn.Sequential(nn.Sequential(Block(), Block())))
        others = [
            of(nn.Sequential(Block(), Block(8))),
            of(nn.Sequential(Block(), Block()), side=16),
            of(nn.Sequential(Block(), Block(), nn.ReLU())),
            of(nn.Sequential(Block(), nn.Conv2d(16, 16, 3, padding=1))),
            of(nn.Sequential(Block(), nn.Conv2d(16, 16, 3, padding=2, dilation=2))),
        ]
        assert len({plain, *others}) == 6

    def test_shapes_count_and_weights_of_few_channels_do_not(self) -> None:
        def of(module: nn.Module) -> str:
            return onnx_key(to_onnx(module.eval().requires_grad_(False), torch.zeros(2, 4, 4, 4)))

        assert of(nn.Conv2d(4, 4, 1)) == of(nn.Conv2d(4, 4, 1))
        assert of(nn.Unflatten(1, (2, 2))) != of(nn.Unflatten(1, (1, 4)))
        assert of(nn.Hardtanh(0, 6)) != of(nn.Hardtanh(0, 1))


def a_narrow_block_saves_time(name: str, precision: str, folder: Path) -> None:
    runtime = runtime_of(name, threads=1, precision=precision, device="cpu")
    assert runtime.environment["runtime"] == name
    large = Network(128, 128).eval()
    chain = cut(large, torch.zeros(2, 3, 32, 32), granularity=Granularity.residual)
    places = LatencyTable(chain, large, runtime, batch=4, timings=KeptHere(runtime.environment, folder), limit_s=0.2)
    assert places.difference(1, Block(16)).median_ms < 0
    assert 0 < places.predict({1: Block(16)}) < places.teacher.median_ms


class TestInRuntimes:
    @pytest.mark.parametrize(
        ("name", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("torch", "bf16")]
    )
    def test_a_narrow_block_saves_time(self, tmp_path: Path, name: str, precision: str) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip(name)
        a_narrow_block_saves_time(name, precision, tmp_path)

    def test_it_does_in_openvino(self, tmp_path: Path) -> None:
        """In a process of its own: in one that has run OpenVINO 2026 beside torch, a Python signal handler that raises
        ends in a segmentation fault."""
        pytest.importorskip("onnx")
        pytest.importorskip("openvino")
        call = f"a_narrow_block_saves_time('openvino', 'fp32', Path({str(tmp_path)!r}))"
        program = (
            f"from pathlib import Path; from tests.unit.deployment.test_chains import a_narrow_block_saves_time; {call}"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "setting", "words"),
        [
            ({"name": "onnxruntime", "precision": "bf16"}, "deploy.precision", "one of fp32, int8 with onnxruntime"),
            ({"name": "torch", "precision": "int8"}, "deploy.precision", "one of fp32, bf16 with torch"),
            ({"name": "onnxruntime", "device": "cuda"}, "deploy.device", "cpu with onnxruntime"),
        ],
    )
    def test_what_a_runtime_cannot_do_names_the_setting(self, given: dict[str, str], setting: str, words: str) -> None:
        pytest.importorskip("onnxruntime")
        with pytest.raises(ConfigError) as error:
            runtime_of(**{"threads": 1, "precision": "fp32", "device": "cpu"} | given)  # type: ignore[arg-type]
        assert error.value.setting == setting
        assert words in str(error.value)

    def test_an_absent_runtime_is_refused_by_name_and_none_is_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("distill.deployment.runtimes.find_spec", lambda name: None if name == "onnxruntime" else 1)
        with pytest.raises(ConfigError, match=r"deploy.runtime: got 'onnxruntime'.*pip install -e '.\[onnx\]'"):
            runtime_of("onnxruntime", threads=1, precision="fp32", device="cpu")
        assert runtime_of(None, threads=1, precision="fp32", device="cpu").name == "torch"

    def test_a_table_from_elsewhere_must_be_one_that_fits_and_has_the_piece(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        path.write_text("{}")
        with pytest.raises(ConfigError, match=r"deploy.table.*measure.py wrote"):
            MeasuredElsewhere(path)
        path.write_text(
            '{"format": 1, "environment": {"runtime": "onnxruntime", "threads": 4, "precision": "fp32"}, '
            '"timings": {"k-b4": {"median_ms": 2.0, "low_ms": 1, "high_ms": 3, "error_ms": 0.1, "rounds": 9}}}'
        )
        found = MeasuredElsewhere(path)
        assert found.get("k-b4", "it") == Timing(2.0, 1, 3, 0.1, 9)
        found.check({"runtime": None, "threads": None, "precision": "fp32"})
        with pytest.raises(ConfigError, match=r"deploy.threads: got 1; expected 4, as .*table.json was measured"):
            found.check({"threads": 1})
        with pytest.raises(ConfigError, match=r"a table that has block 3; make the bundle again"):
            found.get("k-b8", "block 3")
