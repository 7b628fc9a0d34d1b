"""A run directory: whose it is, which stages are complete, and what becomes of damaged files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from distill.errors import ConfigError
from distill.storage.files import DamagedFileError, DiskError, read_commented, write_bytes, write_json
from distill.storage.run_directory import RunDirectory

IDENTITY = {"seed": 1, "data.mean": [0.5, 0.5], "distill.lr": 0.1}
OTHER = IDENTITY | {"seed": 2}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def in_a_folder_s_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [flipped, truncated, emptied]


def filled(folder: Path, *, teacher: bytes = b"teacher", identity: dict[str, object] = IDENTITY) -> RunDirectory:
    """A run with two complete stages, of which the second used the first one's file."""
    run = RunDirectory(folder)
    run.claim(identity, "seed: 1\n")
    write_bytes(folder / "teacher.safetensors", teacher)
    run.complete("teacher", {"epochs": []}, made=["teacher.safetensors"])
    write_bytes(folder / "student.safetensors", b"student of " + teacher)
    run.complete("deliver", {"top1": 90.0}, made=["student.safetensors"], used=["teacher.safetensors"])
    run.release()
    return run


def claimed_again(folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    run.claim(IDENTITY, "seed: 1\n")
    run.release()
    return run


class TestClaim:
    def test_attempts_are_counted(self, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            run = RunDirectory(tmp_path)
            assert run.claim(IDENTITY, "") == number
            run.release()

    def test_the_configuration_reads_back(self, tmp_path: Path) -> None:
        claimed_again(tmp_path)
        assert read_commented(tmp_path / "resolved.yaml") == "seed: 1\n"

    def test_another_configuration_is_refused_with_what_differs(self, tmp_path: Path) -> None:
        filled(tmp_path)
        with pytest.raises(ConfigError, match=r"differing: seed=1 there, 2 here"):
            RunDirectory(tmp_path).claim(OTHER, "")

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("important")
        with pytest.raises(ConfigError, match="expected an empty or new directory"):
            RunDirectory(tmp_path).claim(IDENTITY, "")
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_second_job_is_refused_and_told_who_works_there(self, tmp_path: Path) -> None:
        first = RunDirectory(tmp_path)
        first.claim(IDENTITY, "")
        with pytest.raises(ConfigError, match=rf"no other job works: process {os.getpid()} on .*, since 2") as caught:
            RunDirectory(tmp_path).claim(IDENTITY, "")
        assert str(caught.value).startswith(f"run.dir: got '{tmp_path}'; expected a folder in which")
        first.release()
        claimed_again(tmp_path)

    @pytest.mark.parametrize("written", range(4))
    def test_a_disk_that_fills_up_during_a_claim_refuses_nothing_afterwards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
    ) -> None:
        synced, fsync = [], os.fsync

        def full(handle: int) -> None:
            synced.append(handle)
            if len(synced) > written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DiskError):
            RunDirectory(tmp_path).claim(IDENTITY, "")
        monkeypatch.undo()
        with pytest.raises(ConfigError) if written > 1 else nullcontext():
            other = RunDirectory(tmp_path)
            other.claim(OTHER, "")
            other.release()
        if written > 1:
            claimed_again(tmp_path)


class TestDamage:
    def test_a_whole_run_is_whole(self, tmp_path: Path) -> None:
        filled(tmp_path)
        run = claimed_again(tmp_path)
        assert (run.mended, run.result("teacher"), run.result("deliver")) == ([], {"epochs": []}, {"top1": 90.0})
        assert run.read("teacher.safetensors") == b"teacher"

    @pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
    @pytest.mark.parametrize("name", ["teacher.safetensors", "stages/teacher.json"])
    def test_a_stage_is_done_again_where_its_file_or_its_record_is_damaged(
        self, tmp_path: Path, name: str, damage: Callable[[Path], None]
    ) -> None:
        filled(tmp_path)
        damage(tmp_path / name)
        run = claimed_again(tmp_path)
        assert run.result("teacher") is None
        assert run.result("deliver") == {"top1": 90.0}, "it stands where the teacher comes out as it was"
        if (damage, name) != (Path.unlink, "stages/teacher.json"):
            assert [told.split(": ")[:2] for told in run.mended] == [
                ["stage teacher is done again", str(tmp_path / name)]
            ]

    @pytest.mark.parametrize("name", ["teacher.safetensors", "stages/teacher.json", "identity.json", "generation.json"])
    def test_a_folder_in_the_place_of_a_file_is_named_and_refused(self, tmp_path: Path, name: str) -> None:
        filled(tmp_path)
        in_a_folder_s_place(tmp_path / name)
        with pytest.raises((DamagedFileError, DiskError), match=f"{name}: a folder is in its place; remove it"):
            claimed_again(tmp_path)

    @pytest.mark.parametrize("name", ["teacher.safetensors", "stages/teacher.json", "stages/deliver.json"])
    def test_another_run_s_file_is_not_believed(self, tmp_path: Path, name: str) -> None:
        filled(tmp_path / "here")
        filled(tmp_path / "there", teacher=b"another", identity=OTHER)
        (tmp_path / "here" / name).write_bytes((tmp_path / "there" / name).read_bytes())
        assert len(claimed_again(tmp_path / "here").mended) == 1

    def test_a_record_in_the_place_of_another_is_not_believed(self, tmp_path: Path) -> None:
        filled(tmp_path)
        (tmp_path / "stages" / "teacher.json").write_bytes((tmp_path / "stages" / "deliver.json").read_bytes())
        assert claimed_again(tmp_path).result("teacher") is None

    @pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
    @pytest.mark.parametrize("name", ["identity.json", "generation.json"])
    def test_either_of_the_two_that_say_whose_run_it_is_is_written_anew(
        self, tmp_path: Path, name: str, damage: Callable[[Path], None]
    ) -> None:
        filled(tmp_path)
        damage(tmp_path / name)
        run = claimed_again(tmp_path)
        assert run.result("teacher") is not None
        assert json.loads((tmp_path / "identity.json").read_text())["seed"] == 1
        assert [str(tmp_path / name) in told for told in run.mended] == [True] or damage is Path.unlink

    def test_the_number_of_attempts_is_found_again_from_the_traces(self, tmp_path: Path) -> None:
        filled(tmp_path)
        for name in ("rank0.3.json", "rank1.7.json", "else.json"):
            write_json(tmp_path / "traces" / name, {})
        flipped(tmp_path / "generation.json")
        assert RunDirectory(tmp_path).claim(IDENTITY, "") == 8

    def test_a_run_whose_owner_nothing_tells_is_refused(self, tmp_path: Path) -> None:
        filled(tmp_path)
        flipped(tmp_path / "identity.json")
        flipped(tmp_path / "generation.json")
        with pytest.raises(DamagedFileError, match=r"identity\.json: damaged"):
            claimed_again(tmp_path)

    def test_a_file_that_is_damaged_later_is_refused_when_it_is_read(self, tmp_path: Path) -> None:
        run = filled(tmp_path)
        flipped(tmp_path / "teacher.safetensors")
        with pytest.raises(DamagedFileError, match=r"teacher\.safetensors: damaged"):
            run.read("teacher.safetensors")


class TestDoneAgain:
    def test_with_the_same_bits_later_stages_stand(self, tmp_path: Path) -> None:
        filled(tmp_path)
        flipped(tmp_path / "teacher.safetensors")
        run = claimed_again(tmp_path)
        write_bytes(tmp_path / "teacher.safetensors", b"teacher")
        run.complete("teacher", {}, made=["teacher.safetensors"])
        assert run.result("deliver") == {"top1": 90.0}
        assert [*run.damaged()] == []

    def test_with_other_bits_those_that_used_them_are_forgotten(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        filled(tmp_path)
        flipped(tmp_path / "teacher.safetensors")
        run = claimed_again(tmp_path)
        before = run.origin("teacher.safetensors")
        write_bytes(tmp_path / "teacher.safetensors", b"another teacher")
        run.complete("teacher", {}, made=["teacher.safetensors"])
        assert run.result("deliver") is None
        assert "stage deliver is done again: it used another teacher.safetensors" in caplog.text
        assert run.origin("teacher.safetensors") != before, "blocks and checkpoints of the first are not taken up"

    def test_origins_differ_by_identity(self, tmp_path: Path) -> None:
        runs = [filled(tmp_path / str(seed), identity=one) for seed, one in enumerate((IDENTITY, OTHER, IDENTITY))]
        origins = [run.origin("teacher.safetensors", "unknown.safetensors") for run in runs]
        assert origins[0] == origins[2] != origins[1]
