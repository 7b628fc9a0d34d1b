"""Files that are whole or not there at all, also where the disk is full."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distill.files import DiskError, read_json, write_bytes, write_json, write_text


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestWriting:
    def test_content_is_what_was_given_and_folders_are_made(self, tmp_path: Path) -> None:
        write_bytes(tmp_path / "a" / "b" / "file", b"\0\xff")
        assert (tmp_path / "a" / "b" / "file").read_bytes() == b"\0\xff"

    def test_file_names_of_any_encoding_can_be_written_and_the_file_can_be_read(self, tmp_path: Path) -> None:
        write_text(tmp_path / "file", "skipped: " + os.fsdecode(b"caf\xe9.png"))
        assert (tmp_path / "file").read_text(encoding="utf-8").startswith("skipped: caf")

    def test_takes_the_place_of_an_earlier_file(self, tmp_path: Path) -> None:
        write_text(tmp_path / "file", "long before")
        write_text(tmp_path / "file", "after")
        assert (tmp_path / "file").read_text() == "after"

    def test_leaves_nothing_else_in_the_folder(self, tmp_path: Path) -> None:
        write_bytes(tmp_path / "file", b"content")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_the_file_appears_only_when_its_content_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        fsync = os.fsync

        def watched(handle: int) -> None:
            seen.append((tmp_path / "file").exists())
            fsync(handle)

        monkeypatch.setattr(os, "fsync", watched)
        write_bytes(tmp_path / "file", b"content")
        assert seen[0] is False


class TestFullDisk:
    def test_error_names_the_file_and_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(DiskError) as caught:
            write_bytes(tmp_path / "file", b"new")
        path = tmp_path / "file"
        assert str(caught.value) == f"cannot write {path}: No space left on device; free some space or set run.dir"

    def test_the_old_file_stands_and_no_temporary_one_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_bytes(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(DiskError):
            write_bytes(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_write_that_is_cut_off_by_the_system_leaves_the_old_file(self, tmp_path: Path) -> None:
        # A limit on the size of files stops the write half way, as a full disk does. In a process of its own, because
        # the limit holds for all files of a process.
        program = """
            import resource, signal, sys
            from pathlib import Path
            from distill.files import DiskError, write_bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                write_bytes(Path(sys.argv[1]), bytes(100_000))
            except DiskError as error:
                sys.stdout.write(str(error))
        """
        write_bytes(tmp_path / "file", b"old")
        package = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "file")],
            cwd=package, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.startswith(f"cannot write {tmp_path / 'file'}: File too large")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}/file/inside: "):
            write_bytes(tmp_path / "file" / "inside", b"content")


class TestJson:
    def test_value_reads_back_equal(self, tmp_path: Path) -> None:
        value = {"a": [1, 2.5, None], "b": "text"}
        write_json(tmp_path / "file.json", value)
        assert read_json(tmp_path / "file.json") == value
        assert (tmp_path / "file.json").read_text().endswith("}\n")

    def test_a_file_that_is_not_there_is_none(self, tmp_path: Path) -> None:
        assert read_json(tmp_path / "missing.json") is None


def test_a_written_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
