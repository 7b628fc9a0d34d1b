"""Files that are whole or not there at all, also where the disk is full."""

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from distill.storage.files import (
    DamagedFileError,
    DiskError,
    append_json,
    json_line,
    read_commented,
    read_json,
    read_lines,
    write_bytes,
    write_commented,
    write_json,
    write_text,
)


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
            from distill.storage.files import DiskError, write_bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                write_bytes(Path(sys.argv[1]), bytes(100_000))
            except DiskError as error:
                sys.stdout.write(str(error))
        """
        write_bytes(tmp_path / "file", b"old")
        package = Path(__file__).parents[3]
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
    def test_numbers_that_json_does_not_know_are_null_and_read_back(self, tmp_path: Path) -> None:
        value = {"a": {"b/~c": [1.0, math.nan]}, "inf": math.inf, "low": -math.inf, "whole": 1.5}
        write_json(tmp_path / "file.json", value)
        plain = json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail)
        assert plain["a"] == {"b/~c": [1.0, None]}
        assert plain["inf"] is plain["low"] is None
        assert plain["not_finite"] == {"/a/b~1~0c/1": "nan", "/inf": "inf", "/low": "-inf"}
        assert repr(read_json(tmp_path / "file.json")) == repr(value)

    def test_keys_and_tuples_come_back_as_json_has_them(self, tmp_path: Path) -> None:
        write_json(tmp_path / "file.json", {"ranks": {10: 1, 9: (2, 3)}})
        assert read_json(tmp_path / "file.json") == {"ranks": {"10": 1, "9": [2, 3]}}

    def test_other_white_space_is_the_same_value(self, tmp_path: Path) -> None:
        write_json(tmp_path / "file.json", {"a": 1, "b": "text"})
        (tmp_path / "file.json").write_text(json.dumps(json.loads((tmp_path / "file.json").read_text()), indent=7))
        assert read_json(tmp_path / "file.json") == {"a": 1, "b": "text"}

    def test_every_flipped_bit_is_noticed_or_changes_nothing(self, tmp_path: Path) -> None:
        value = {"lr": 0.125, "name": "x", "nan": math.nan}
        write_json(tmp_path / "file.json", value)
        whole = (tmp_path / "file.json").read_bytes()
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (tmp_path / "file.json").write_bytes(damaged)
            with suppress(DamagedFileError):  # white space may be other white space
                assert repr(read_json(tmp_path / "file.json")) == repr(value)

    @pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{}", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000])
    def test_what_was_not_written_here_is_damaged(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "file.json").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"file\.json: damaged \("):
            read_json(tmp_path / "file.json")

    def test_a_file_under_another_s_name_is_damaged(self, tmp_path: Path) -> None:
        write_json(tmp_path / "file.json", {"a": 1})
        (tmp_path / "file.json").rename(tmp_path / "other.json")
        with pytest.raises(DamagedFileError, match="not what its checksum says"):
            read_json(tmp_path / "other.json")

    def test_a_folder_and_a_file_that_may_not_be_read_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "folder.json").mkdir()
        with pytest.raises(DamagedFileError, match=r"folder\.json: a folder is in its place"):
            read_json(tmp_path / "folder.json")

        def refused(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "read_bytes", refused)  # the superuser may read everything
        with pytest.raises(DamagedFileError, match=r"file\.json: cannot be read \(Permission denied\)"):
            read_json(tmp_path / "file.json")

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


class TestLines:
    def test_lines_that_are_not_whole_are_told_and_the_others_read(self, tmp_path: Path) -> None:
        path = tmp_path / "file.jsonl"
        append_json(path, {"a": 1})
        with path.open("ab") as file:
            file.write(b'{"a": 2, "ch')  # killed while it wrote
        append_json(path, {"a": math.nan})
        first, torn, last = read_lines(path)
        assert first == {"a": 1}
        assert str(torn).startswith(f"{path}: line 2 is damaged (")
        assert repr(last) == "{'a': nan}"

    def test_a_line_of_another_file_is_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "file.jsonl").write_text(json_line({"a": 1}, "other.jsonl"))
        assert [type(line) for line in read_lines(tmp_path / "file.jsonl")] == [DamagedFileError]

    def test_a_file_that_is_not_there_has_no_lines(self, tmp_path: Path) -> None:
        assert [*read_lines(tmp_path / "file.jsonl")] == []

    def test_a_folder_in_its_place_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file.jsonl").mkdir()
        assert [str(line) for line in read_lines(tmp_path / "file.jsonl")] == [
            f"{tmp_path}/file.jsonl: a folder is in its place; remove it"
        ]
        with pytest.raises(DiskError, match=r"cannot write .*file\.jsonl: Is a directory"):
            append_json(tmp_path / "file.jsonl", {})


def test_a_text_with_its_checksum_reads_back_and_an_edited_one_is_refused(tmp_path: Path) -> None:
    write_commented(tmp_path / "file.yaml", "a: 1\n# checksum: none\n")
    assert read_commented(tmp_path / "file.yaml") == "a: 1\n# checksum: none\n"
    for damaged in (b"a: 1\n", b"\xff", (tmp_path / "file.yaml").read_bytes().replace(b"a: 1", b"a: 2")):
        (tmp_path / "file.yaml").write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"file\.yaml: damaged"):
            read_commented(tmp_path / "file.yaml")
