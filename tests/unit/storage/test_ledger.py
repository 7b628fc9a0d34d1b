"""Rank 0's record of finished blocks: what it believes when it is read again."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from distill.storage.files import DiskError, json_line
from distill.storage.ledger import Entry, Ledger


def entry(block: int, *, rank: int = 0, error: float = 0.25) -> Entry:
    return Entry(
        unit=block, block=block, name=f"layer{block}", rank=rank, steps=200, status="finished", rel_error_first=1.0,
        rel_error_last=error, seconds=3.5, finished_at_s=4.0, generation=1,
    )  # fmt: skip


def blob(value: float) -> bytes:
    return save({"conv.weight": torch.full((2, 3), value)})


def append(run_dir: Path, text: str) -> None:
    with (run_dir / "ledger.jsonl").open("a") as file:
        file.write(text)


class TestRecord:
    def test_what_is_recorded_is_there_when_the_ledger_is_opened_again(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        written = [ledger.record(entry(block), blob(block)) for block in (3, 0, 11)]
        again = Ledger(tmp_path)
        assert again.entries == {one.unit: one for one in written}
        assert torch.equal(again.weights(11)["conv.weight"], torch.full((2, 3), 11.0))

    def test_an_empty_run_directory_has_no_entries(self, tmp_path: Path) -> None:
        assert Ledger(tmp_path).entries == {}

    def test_the_entry_gets_the_checksum_of_its_file(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        one = ledger.record(entry(0), blob(0.0))
        assert len(one.sha256) == 64
        assert ledger.file(0).read_bytes() == blob(0.0)
        assert one.sha256 != ledger.record(entry(1), blob(1.0)).sha256

    def test_a_block_recorded_twice_keeps_its_first_entry_and_weights(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        first = ledger.record(entry(2, rank=1), blob(1.0))
        assert ledger.record(entry(2, rank=5, error=0.1), blob(2.0)) == first
        assert Ledger(tmp_path).entries == {2: first}
        assert torch.equal(ledger.weights(2)["conv.weight"], torch.ones(2, 3))
        assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1

    def test_a_diverged_block_reads_back_with_its_step(self, tmp_path: Path) -> None:
        diverged = Entry(**{**vars(entry(1)), "status": "diverged", "diverged_at": 17, "rel_error_last": float("nan")})
        Ledger(tmp_path).record(diverged, blob(0.0))
        again = Ledger(tmp_path).entries[1]
        assert (again.status, again.diverged_at) == ("diverged", 17)

    def test_weights_that_cannot_be_read_back_are_not_recorded(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        with pytest.raises(Exception, match=r"(?i)header|deserial"):
            ledger.record(entry(0), blob(0.0)[:-3])
        assert ledger.entries == {}
        assert not (tmp_path / "ledger.jsonl").exists()


class TestBelief:
    def test_a_line_of_an_earlier_version_which_knew_blocks_alone_is_believed(self, tmp_path: Path) -> None:
        written = Ledger(tmp_path).record(entry(3), blob(3))
        (line,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
        facts = {key: value for key, value in json.loads(line).items() if key not in ("unit", "checksum")}
        (tmp_path / "ledger.jsonl").write_text(json_line(facts, "ledger.jsonl"))
        assert Ledger(tmp_path).entries == {3: written}

    @pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"\1", lambda b: b""])
    def test_a_damaged_file_is_warned_of_and_its_block_forgotten(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
    ) -> None:
        ledger = Ledger(tmp_path)
        ledger.record(entry(0), blob(0.0))
        ledger.record(entry(1), blob(1.0))
        ledger.file(1).write_bytes(damage(blob(1.0)))  # type: ignore[operator]
        with caplog.at_level(logging.WARNING):
            again = Ledger(tmp_path)
        assert set(again.entries) == {0}
        assert "blocks/01.safetensors: damaged: it is not the file" in caplog.text
        assert "the block is trained again" in caplog.text

    def test_a_missing_file_is_warned_of_and_its_block_forgotten(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger = Ledger(tmp_path)
        ledger.record(entry(0), blob(0.0))
        ledger.file(0).unlink()
        assert Ledger(tmp_path).entries == {}
        assert "blocks/00.safetensors: missing; the block is trained again" in caplog.text

    @pytest.mark.parametrize("line", ['{"block": 7, "na', "", "[]", "7", '{"block": 7, "surprise": 1}', "\0\0\0"])
    def test_a_line_that_is_not_whole_is_warned_of_and_the_others_believed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str
    ) -> None:
        Ledger(tmp_path).record(entry(0), blob(0.0))
        append(tmp_path, line + "\n")
        assert set(Ledger(tmp_path).entries) == {0}
        assert "ledger.jsonl: line 2 is damaged" in caplog.text

    def test_bytes_that_are_no_text_are_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        Ledger(tmp_path).record(entry(0), blob(0.0))
        with (tmp_path / "ledger.jsonl").open("ab") as file:
            file.write(b"\xff\xfe\n")
        assert set(Ledger(tmp_path).entries) == {0}
        assert "ledger.jsonl: line 2 is damaged" in caplog.text

    def test_after_a_half_line_the_next_block_is_recorded_durably(self, tmp_path: Path) -> None:
        Ledger(tmp_path).record(entry(0), blob(0.0))
        append(tmp_path, json.dumps(vars(entry(1)))[:40])  # the process died in the middle of the line
        Ledger(tmp_path).record(entry(2), blob(2.0))
        assert set(Ledger(tmp_path).entries) == {0, 2}

    def test_a_block_whose_file_was_damaged_can_be_recorded_again(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.record(entry(0), blob(0.0))
        ledger.file(0).write_bytes(b"damaged")
        Ledger(tmp_path).record(entry(0, rank=4), blob(5.0))
        again = Ledger(tmp_path)
        assert again.entries[0].rank == 4
        assert torch.equal(again.weights(0)["conv.weight"], torch.full((2, 3), 5.0))


class TestFullDisk:
    def test_a_block_that_cannot_be_written_is_not_in_the_ledger(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = Ledger(tmp_path)
        ledger.record(entry(0), blob(0.0))

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match=r"blocks/01\.safetensors: No space left on device"):
            ledger.record(entry(1), blob(1.0))
        assert set(ledger.entries) == {0}
        assert set(Ledger(tmp_path).entries) == {0}
        assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["00.safetensors"]

    def test_a_line_that_cannot_be_written_is_an_error_that_names_the_ledger(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        fsync = os.fsync

        def full_at_second(handle: int) -> None:
            calls.append(handle)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        ledger = Ledger(tmp_path)
        monkeypatch.setattr(os, "fsync", full_at_second)
        with pytest.raises(DiskError, match=r"ledger\.jsonl: No space left on device"):
            ledger.record(entry(1), blob(1.0))
        assert ledger.entries == {}
