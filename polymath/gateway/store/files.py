"""Durable maps and logs of the embedded store: small files that other processes may change too."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson
from filelock import FileLock

from polymath.errors import StoreUnavailable

__all__ = ["LogFile", "MapFile"]

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
LOCK_SECONDS = 5.0
State = tuple[int, int, int] | None


class MapFile:
    """A map of JSON values in a file, read again when the file has changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values: dict[str, bytes] = {}
        self._state: State = None

    def values(self) -> Mapping[str, bytes]:
        """What the file holds now.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        state = _state(self._file)
        if state != self._state:
            self._values = {} if state is None else _read_map(self._file)
            self._state = state
        return self._values

    def write(self, field: str, value: bytes) -> None:
        """Set a field.

        Raises:
            StoreUnavailable: the file cannot be written; it is as it was.
        """
        with _writing(self._file):
            self._replace({**self.values(), field: value})

    def erase(self, field: str) -> bool:
        """Take a field out; whether it was there.

        Raises:
            StoreUnavailable: as `write`.
        """
        if field not in self.values():
            return False
        with _writing(self._file):
            kept = dict(self.values())
            found = kept.pop(field, None) is not None  # unless another process was faster
            self._replace(kept)
        return found

    def _replace(self, values: dict[str, bytes]) -> None:
        text = {name: value.decode() for name, value in values.items()}
        _replace_file(self._file, orjson.dumps(text, option=orjson.OPT_INDENT_2))
        self._values, self._state = values, _state(self._file)


class LogFile:
    """Entries, a line each, the newest last; at most twice as many as are wanted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: int | None = None

    def append(self, entry: bytes, most: int) -> None:
        """Add an entry, which holds no line end.

        Raises:
            StoreUnavailable: the file cannot be written.
        """
        with _writing(self._file):
            if self._lines is None:
                self._lines = len(self._read())
            _append_line(self._file, entry)
            self._lines += 1
            if self._lines > 2 * most:
                kept = self._read()[-most:]
                _replace_file(self._file, b"".join(line + b"\n" for line in kept))
                self._lines = len(kept)

    def recent(self, most: int) -> list[bytes]:
        """The last entries, the newest first.

        Raises:
            StoreUnavailable: the file cannot be read.
        """
        return self._read()[: -most - 1 : -1]

    def _read(self) -> list[bytes]:
        try:
            return self._file.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unavailable(self._file, "read", error) from error


def _state(file: Path) -> State:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unavailable(file, "read", error) from error
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def _read_map(file: Path) -> dict[str, bytes]:
    try:
        values = orjson.loads(file.read_bytes())
        return {name: value.encode() for name, value in values.items()}
    except OSError as error:
        raise _unavailable(file, "read", error) from error
    except (ValueError, AttributeError) as error:
        raise StoreUnavailable(f"{file} is damaged: it is no JSON object of texts.") from error


def _append_line(file: Path, line: bytes) -> None:
    """The whole line or nothing of it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE_FILE)
    with os.fdopen(descriptor, "ab", buffering=0) as stream:
        size = stream.tell()
        try:
            written = stream.write(line + b"\n")
            if written != len(line) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(size)
            raise


def _replace_file(file: Path, data: bytes) -> None:
    """The old file or the new one, never half of it, whatever happens meanwhile."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Alone with a file, in a folder that exists."""
    try:
        file.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except OSError as error:  # filelock's own time-out is one too
        raise _unavailable(file, "written", error) from error


def _unavailable(file: Path, what: str, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"{file} cannot be {what} ({error.strerror or error}).")
