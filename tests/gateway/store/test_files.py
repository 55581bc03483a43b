"""Files of the embedded store: private, whole whatever happens, and shared with commands."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from filelock import FileLock

from polymath.errors import StoreUnavailable
from polymath.gateway.store import MemoryStore, files
from polymath.gateway.store.files import LogFile, MapFile

WRITER = """
import asyncio, sys
from pathlib import Path
from polymath.gateway.store import MemoryStore

async def write(folder, name):
    store = MemoryStore(folder)
    for number in range(24):
        await store.write("things", f"{name}{number}", b"1")
        await store.append("audit", f"{name}{number}".encode(), 100)
        if number % 2:
            await store.erase("things", f"{name}{number}")

asyncio.run(write(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "state")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def no_space_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches the disk any more."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- whose they are ------------------------------------------------------------------------------


async def test_only_their_owner_reads_them(store: MemoryStore, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        await store.write("keys", "a", b"1")
        await store.write("keys", "b", b"2")
        for number in range(9):
            await store.append("audit", str(number).encode(), 2)
    finally:
        os.umask(before)
    assert mode(tmp_path / "state") == 0o700
    assert mode(tmp_path / "state" / "keys.json") == 0o600
    assert mode(tmp_path / "state" / "audit.jsonl") == 0o600


async def test_nothing_is_made_before_something_is_written(
    store: MemoryStore, tmp_path: Path
) -> None:
    assert await store.read("keys") == {}
    assert await store.recent("audit", 5) == []
    assert not await store.erase("keys", "a")
    assert not (tmp_path / "state").exists()


async def test_no_other_files_are_left(store: MemoryStore, tmp_path: Path) -> None:
    await store.write("keys", "a", b"1")
    await store.erase("keys", "a")
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert left - {".keys.json.lock"} == {"keys.json"}


async def test_people_can_read_a_map(store: MemoryStore, tmp_path: Path) -> None:
    await store.write("keys", "a", '{"name":"ü"}'.encode())
    text = (tmp_path / "state" / "keys.json").read_bytes()
    assert orjson.loads(text) == {"a": '{"name":"ü"}'}
    assert text.count(b"\n") == 2


# --- who else writes -----------------------------------------------------------------------------


async def test_writers_in_two_processes_lose_nothing(tmp_path: Path) -> None:
    names = ("one", "two")
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in names
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    store = MemoryStore(tmp_path)
    written = {f"{name}{number}" for name in names for number in range(24)}
    kept = {f"{name}{number}" for name in names for number in range(0, 24, 2)}
    assert set(await store.read("things")) == kept
    assert {entry.decode() for entry in await store.recent("audit", 100)} == written


async def test_a_file_that_was_taken_away_is_an_empty_map(
    store: MemoryStore, tmp_path: Path
) -> None:
    await store.write("keys", "a", b"1")
    (tmp_path / "state" / "keys.json").unlink()
    assert await store.read("keys") == {}
    await store.write("keys", "b", b"2")
    assert await store.read("keys") == {"b": b"2"}


async def test_an_unchanged_file_is_not_read_again(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An admission costs a `stat`."""
    await store.write("keys", "a", b"1")
    monkeypatch.setattr(Path, "read_bytes", None)
    assert await store.find("keys", "a") == b"1"


async def test_of_two_that_erase_one_finds_it(tmp_path: Path) -> None:
    """The other comes while the first has the file for itself."""
    one, other = MapFile(tmp_path / "keys.json"), MapFile(tmp_path / "keys.json")
    one.write("a", b"1")
    with FileLock(tmp_path / ".keys.json.lock"):
        late = asyncio.create_task(asyncio.to_thread(other.erase, "a"))
        await asyncio.sleep(0.1)
        (tmp_path / "keys.json").write_bytes(b"{}")
    assert await late is False


async def test_a_lock_that_is_never_let_go_is_an_error(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    await store.write("keys", "a", b"1")
    with (
        FileLock(tmp_path / "state" / ".keys.json.lock"),
        pytest.raises(StoreUnavailable, match=r"keys\.json cannot be written"),
    ):
        await store.write("keys", "b", b"2")
    assert await store.read("keys") == {"a": b"1"}


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b'"a"', b'{"a":1}', b'{"a":{"b":1}}', b"\xff\x00", b'{"a":"1"'],
)
async def test_a_damaged_map_is_named_and_left_alone(
    store: MemoryStore, tmp_path: Path, text: bytes
) -> None:
    await store.write("keys", "a", b"1")
    file = tmp_path / "state" / "keys.json"
    file.write_bytes(text)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=rf"{file} is damaged"):
            await store.read("keys")
        with pytest.raises(StoreUnavailable, match=rf"{file} is damaged"):
            await store.write("keys", "b", b"2")
        with pytest.raises(StoreUnavailable, match=rf"{file} is damaged"):
            await store.erase("keys", "a")
    assert file.read_bytes() == text
    file.write_bytes(b'{"c":"3"}')
    assert await store.read("keys") == {"c": b"3"}


async def test_what_is_no_file_is_named(store: MemoryStore, tmp_path: Path) -> None:
    await store.write("others", "a", b"1")
    for name in ("keys.json", "audit.jsonl"):
        (tmp_path / "state" / name).mkdir()
    with pytest.raises(StoreUnavailable, match=r"keys\.json cannot be read \(Is a directory\)"):
        await store.read("keys")
    with pytest.raises(StoreUnavailable, match=r"audit\.jsonl cannot be read \(Is a directory\)"):
        await store.recent("audit", 5)
    with pytest.raises(StoreUnavailable, match=r"audit\.jsonl cannot be"):
        await store.append("audit", b"1", 5)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = MemoryStore(tmp_path / "file" / "state")
    with pytest.raises(StoreUnavailable, match=r"keys\.json cannot be written \(Not a directory\)"):
        await store.write("keys", "a", b"1")


# --- full disks ----------------------------------------------------------------------------------


async def test_a_full_disk_leaves_the_old_map(tiny_disk: Path) -> None:
    store = MemoryStore(tiny_disk)
    await store.write("keys", "a", b"1")
    old = (tiny_disk / "keys.json").read_bytes()
    with pytest.raises(StoreUnavailable, match=r"keys\.json cannot be written \(No space left"):
        await store.write("keys", "b", b"x" * 100_000)
    assert (tiny_disk / "keys.json").read_bytes() == old
    assert await store.read("keys") == {"a": b"1"}
    assert {path.name for path in tiny_disk.iterdir()} - {".keys.json.lock"} == {"keys.json"}
    await store.write("keys", "b", b"2")
    assert await MemoryStore(tiny_disk).read("keys") == {"a": b"1", "b": b"2"}


async def test_a_full_disk_leaves_no_half_entry_in_a_log(tiny_disk: Path) -> None:
    store = MemoryStore(tiny_disk)
    await store.append("audit", b"1", 10)
    with pytest.raises(StoreUnavailable, match=r"audit\.jsonl cannot be written \(No space left"):
        await store.append("audit", b"x" * 100_000, 10)
    await store.append("audit", b"2", 10)
    assert await store.recent("audit", 10) == [b"2", b"1"]


@pytest.mark.usefixtures("no_space_fault")
async def test_what_does_not_reach_the_disk_replaces_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(b'{"a":"1"}')
    with pytest.raises(StoreUnavailable, match=r"No space left"):
        MapFile(file).write("b", b"2")
    with pytest.raises(StoreUnavailable, match=r"No space left"):
        MapFile(file).erase("a")
    assert file.read_bytes() == b'{"a":"1"}'
    assert {path.name for path in tmp_path.iterdir()} - {".keys.json.lock"} == {"keys.json"}


# --- logs ----------------------------------------------------------------------------------------


def test_a_log_is_at_most_twice_as_long_as_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = LogFile(file)
    for number in range(100):
        log.append(str(number).encode(), 7)
        assert file.read_bytes().count(b"\n") <= 14
    assert log.recent(7) == [str(number).encode() for number in range(99, 92, -1)]


def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    for number in range(30):
        LogFile(file).append(str(number).encode(), 5)
        assert file.read_bytes().count(b"\n") <= 10
    assert LogFile(file).recent(2) == [b"29", b"28"]
    assert LogFile(file).recent(0) == []
