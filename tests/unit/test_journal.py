from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinfra_sdk.worker.journal import Gap, Journal


def everything(journal: Journal, after: int = 0) -> list[bytes | Gap]:
    reader = journal.reader(after)
    found: list[bytes | Gap] = []
    while not reader.at_end:
        items = reader.read()
        found += items
        if not items and reader.at_end:
            break
    return found


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert everything(journal) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=60), st.integers(0, 60))
def test_records_come_back_in_order_after_any_number(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], after: int
) -> None:
    journal = Journal(tmp_path_factory.mktemp("j") / "run", limit=1 << 20)
    numbers = [journal.append(record) for record in records]
    assert numbers == list(range(1, len(records) + 1))
    assert everything(journal, after) == records[after:]


def test_a_reader_follows_while_the_journal_grows(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", limit=32 * 100)  # several segments
    reader = journal.reader()
    seen: list[bytes | Gap] = []
    for number in range(50):
        journal.append(b"%d" % number)
        seen += reader.read()
    assert seen == [b"%d" % number for number in range(50)]


def test_over_the_limit_the_middle_goes_and_the_gap_is_told(tmp_path: Path) -> None:
    limit = 64 << 10
    journal = Journal(tmp_path / "run", limit=limit)
    for number in range(400):
        journal.append(b"%05d" % number + b"x" * 1000)
    size = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert size < limit + 2 * (limit // 32 + 1100)
    found = everything(journal)
    gaps = [item for item in found if isinstance(item, Gap)]
    kept = [int(item[:5]) + 1 for item in found if isinstance(item, bytes)]
    assert kept[0] == 1 and kept[-1] == 400
    assert kept == sorted(kept)
    (gap,) = gaps
    assert sorted([*kept, *range(gap.first, gap.last + 1)]) == list(range(1, 401))


def test_a_slow_reader_meets_the_gap_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", limit=32 << 10)
    reader = journal.reader()
    journal.append(b"first")
    assert reader.read() == [b"first"]
    for _ in range(200):
        journal.append(b"x" * 1000)
    rest: list[bytes | Gap] = []
    while not reader.at_end:
        rest += reader.read()
    gaps = [item for item in rest if isinstance(item, Gap)]
    passed = sum(item.last - item.first + 1 for item in gaps) + len(rest) - len(gaps)
    assert gaps and passed == 200


@pytest.mark.parametrize("cut", [1, 4, 9, 100])
def test_what_a_crash_cut_off_is_ignored(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path / "run")
    for number in range(20):
        journal.append(b"%03d" % number + b"y" * 100)
    journal.close()
    (segment,) = (tmp_path / "run").glob("*.records")
    os.truncate(segment, segment.stat().st_size - cut)
    recovered = Journal.recover(tmp_path / "run")
    assert recovered.last == 19
    assert len(everything(recovered)) == 19


def test_a_flipped_bit_ends_the_journal_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    for number in range(5):
        journal.append(b"%03d" % number)
    (segment,) = (tmp_path / "run").glob("*.records")
    data = bytearray(segment.read_bytes())
    data[2 * 11 + 9] ^= 1
    segment.write_bytes(data)
    assert everything(Journal.recover(tmp_path / "run")) == [b"000", b"001"]


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal.append(b"x")
    assert oct((tmp_path / "run").stat().st_mode & 0o777) == "0o700"
    (segment,) = (tmp_path / "run").iterdir()
    assert oct(segment.stat().st_mode & 0o777) == "0o600"
    journal.remove()
    assert list(tmp_path.iterdir()) == []
