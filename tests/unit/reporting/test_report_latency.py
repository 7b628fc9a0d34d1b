"""Whether the student is faster, answered from the runtime where it was measured and from eager PyTorch where not."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill.reporting import comparison_table, result_table
from distill.reporting.headline import headline
from distill.reporting.page import run_page
from distill.reporting.run import Run
from tests.run_directories import metrics, run_directory


def timing(median_ms: float) -> dict[str, Any]:
    spread = {"low_ms": 0.9 * median_ms, "high_ms": 1.2 * median_ms, "error_ms": 0.01 * median_ms, "rounds": 12}
    return {"median_ms": median_ms, **spread}


def latency(**changes: Any) -> dict[str, Any]:
    batches = {
        "1": {"teacher": timing(0.8), "student": timing(0.4), "ratio": 0.5},
        "8": {"teacher": timing(5.0), "student": timing(6.0), "ratio": 1.2},
        "64": {"teacher": timing(40.0), "student": timing(20.0), "ratio": 0.5},
    }
    return {
        "runtime": "onnxruntime", "version": "1.2", "threads": 1, "precision": "fp32", "clock": "processor",
        "cpu": "Some CPU", "device": "cpu", "batch": 8, "batches": batches,
    } | changes  # fmt: skip


def table(content: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(content))
    return console.export_text()


def text_of(page: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def run(folder: Path, **changes: Any) -> Run:
    return Run(run_directory(folder, metrics(**changes)))


class TestMeasuredInTheRuntime:
    def test_the_sentence_tells_every_batch_and_in_what(self, tmp_path: Path) -> None:
        words = text_of(headline(run(tmp_path, latency=latency())))
        assert (
            "answers one image in 0.40 ms instead of 0.80 ms (2.00x faster) and 8 images in 6.00 ms instead of 5.00 ms "
            "(1.20x slower) and 64 images in 20.00 ms instead of 40.00 ms (2.00x faster), in ONNX Runtime 1.2 (fp32, "
            "1 thread) on Some CPU."
        ) in words
        assert "latency, batch 8 6.00 ms teacher 5.00 ms 1.20x slower" in words
        assert "eager" not in words

    def test_the_table_has_it_before_eager_figures_that_are_named_so(self) -> None:
        text = table(metrics(latency=latency(), environment={"device": "cpu", "threads": 2}))
        assert re.search(r"latency, batch 8, onnxruntime fp32, 1 thread +5\.00 ms +6\.00 ms +1\.200", text)
        assert re.search(r"latency, batch 1, eager fp32, 2 threads +2\.00 ms +2\.00 ms +1\.000", text)
        assert text.index("onnxruntime") < text.index("eager")

    def test_the_page_has_medians_and_their_spread(self, tmp_path: Path) -> None:
        words = text_of(run_page(run(tmp_path, latency=latency())))
        assert "student 64 20.000 18.000 to 24.000 +-1.00 % 12" in words
        assert "In ONNX Runtime 1.2 (fp32, 1 thread) on Some CPU, both networks in turn" in words

    def test_eager_torch_as_the_runtime_is_told_once(self) -> None:
        text = table(metrics(latency=latency(runtime="torch"), environment={"device": "cpu", "threads": 2}))
        assert text.count("batch 64, eager fp32, 1 thread") == 1
        assert "2 threads" not in text

    def test_a_gpu_is_named_in_the_place_of_threads(self, tmp_path: Path) -> None:
        one = latency(runtime="torch_compile", precision="bf16", gpu="Board", device="cuda")
        assert "latency, batch 1, torch_compile bf16 on Board" in table(metrics(latency=one))
        assert "in torch.compile 1.2 (bf16, 1 thread) on Board." in text_of(headline(run(tmp_path, latency=one)))


class TestNotMeasured:
    @pytest.mark.parametrize("given", [None, {}, {"batches": None}, latency(batches={}, reason="student.onnx: failed")])
    def test_older_and_failed_runs_have_eager_figures_named_so(self, tmp_path: Path, given: Any) -> None:
        one = run(tmp_path, latency=given, environment={"device": "cpu", "cpu": "Some CPU"})
        words = text_of(headline(one))
        assert "one image in 2.00 ms instead of 2.00 ms (the same)" in words
        assert "in eager PyTorch on Some CPU." in words
        assert "eager latency, batch 64" in words
        page = text_of(run_page(one))
        assert ("not measured student.onnx: failed" in page) == bool(given and "reason" in given)

    def test_a_figure_that_is_missing_is_a_dash(self, tmp_path: Path) -> None:
        one = latency()
        one["batches"]["8"]["student"] = {}
        words = text_of(headline(run(tmp_path, latency=one)))
        assert "8 images" not in words
        assert "latency, batch 8 - teacher 5.00 ms" in words


class TestInt8:
    def test_the_page_has_what_it_costs_and_how_fast_it_is(self, tmp_path: Path) -> None:
        batches = latency()["batches"]
        sides = {
            side: {"file": f"{side}_int8.onnx", "status": "ok", "bytes": size, "top1": top1}
            for side, size, top1 in (("teacher", 2000, 91.5), ("student", 1000, 88.25))
        }
        training = {"blocks": {"layer1.0": [2e-3, 1e-3]}, "validation_top1": {"as it is": 87.0, "trained": 88.5}}
        sides["student"] |= {"form": "repeated input", "training": training | {"kept": "trained"}}
        found = run(tmp_path, int8={"images": 512, "latency": {"batches": batches}, **sides})
        words = text_of(run_page(found))
        assert "In INT8" in words
        assert "bytes top-1 in fp32 ms, batch 1 ms, batch 8 ms, batch 64" in words
        assert re.search(r"student_int8.onnx 1,000 88\.25 % \S+ % 0\.400 6\.000 20\.000", words)
        assert (
            "repeated input; layer1.0 trained for INT8 (validation images: as it is 87.00 %, trained 88.50 %)" in words
        )

    def test_what_went_wrong_is_told_and_nothing_where_none_was_asked_for(self, tmp_path: Path) -> None:
        failed = {"teacher": {"file": "teacher_int8.onnx", "status": "failed", "reason": "no such operation"}}
        assert "no such operation" in text_of(run_page(run(tmp_path / "a", int8=failed)))
        assert "In INT8" not in text_of(run_page(run(tmp_path / "b", int8={"reason": "not in deploy.programs"})))


class TestCompared:
    def shown(self, *folders: Path) -> str:
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(comparison_table(folders))
        return " ".join(console.export_text().split())

    def test_runs_are_compared_in_their_runtime_where_all_have_one(self, tmp_path: Path) -> None:
        folders = [run(tmp_path / name, latency=latency()).path for name in "ab"]
        text = self.shown(*folders)
        assert re.search(r"500 k +0\.40 +20\.0", text)
        assert "student's, ms in ONNX Runtime 1.2 (fp32, 1 thread) on Some CPU; distill:" in text

    def test_they_are_compared_eager_where_one_has_none(self, tmp_path: Path) -> None:
        text = self.shown(run(tmp_path / "a", latency=latency()).path, run(tmp_path / "b").path)
        assert re.search(r"500 k +2\.00 +30\.0", text)
        assert "ms in eager PyTorch; distill:" in text
