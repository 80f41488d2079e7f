import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.errors import CheckpointError, EnvironmentFault
from loop.state.files import (
    canonical_json,
    commit_folder,
    differences,
    lock_folder,
    prepare_folder,
    read_canonical_json,
    read_regular_file,
    remove_folder,
    replace_file,
    sha256,
)
from tests.conftest import flags
from tests.processes import no_run_outlives_its_test, run, start, wait_until
from tests.test_train import assert_same_run, size

__all__ = ["no_run_outlives_its_test"]  # an autouse fixture acts where it is imported

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('aé\n"\\☃'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abé", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail rather than hang."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# JSON


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ({}, b"{}"),
        ({"b": 1, "a": [True, None, 0.1, 1e-08, -3]}, b'{"a":[true,null,0.1,1e-08,-3],"b":1}'),
        ({"name": "é ☃"}, '{"name":"é ☃"}'.encode()),
        ({"line": "a\n\"b\"\\"}, b'{"line":"a\\n\\"b\\"\\\\"}'),
        ({"deep": {"y": {}, "x": []}}, b'{"deep":{"x":[],"y":{}}}'),
    ],
)  # fmt: skip
def test_canonical_json_has_sorted_keys_no_spaces_and_utf8(
    value: dict[str, Any], spelling: bytes
) -> None:
    assert canonical_json(value) == spelling
    assert read_canonical_json(spelling, Path("state.json")) == value


@given(value=st.dictionaries(st.text("abé", max_size=3), JSON_VALUES, max_size=4))
@settings(derandomize=True, max_examples=60)
def test_canonical_json_is_read_back_and_does_not_depend_on_the_order_of_keys(
    value: dict[str, Any],
) -> None:
    content = canonical_json(value)
    assert read_canonical_json(content, Path("state.json")) == value
    assert canonical_json(dict(reversed(value.items()))) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_canonical_json_has_no_spelling_for_what_is_not_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"a":1}x',
        b'{"a":1,"a":1}',  # a key twice
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',  # overflows to infinity
        b'{"a": 1}',  # other spellings of the same value
        b'{"a":1}\n',
        b'{"b":1,"a":1}',
        b'{"a":1.00}',
        b'{"a":"\\u0041"}',
        b'\xef\xbb\xbf{"a":1}',  # byte order mark
        b'{"a":"\xff"}',  # not UTF-8
        b'{"a":"\\ud800"}',  # half a character
        b'{"a":' + b"9" * 5000 + b"}",  # more digits than Python reads
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda content: repr(content[:16]),
)
def test_json_in_any_other_spelling_is_refused_by_name(content: bytes) -> None:
    with (
        within(1),
        pytest.raises(CheckpointError, match=r"^run/state\.json: not the JSON that was written$"),
    ):
        read_canonical_json(content, Path("run/state.json"))


def test_differences_name_each_key_with_both_values() -> None:
    was = {"seed": 1, "same": [1, 2], "gone": "x", "nested": {"lr": 0.1, "same": None}}
    now = {"seed": 2, "same": [1, 2], "new": True, "nested": {"lr": 0.2, "same": None}}
    assert differences(was, now) == [
        "gone was 'x', is None",
        "nested.lr was 0.1, is 0.2",
        "new was None, is True",
        "seed was 1, is 2",
    ]
    assert differences(was, was) == []


# Reading


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular_file(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match="file: 5 bytes, expected 4"):
        read_regular_file(path, 4)


def _symlink(path: Path) -> None:
    path.with_name("real").write_bytes(b"x")
    path.symlink_to("real")


def _hard_link(path: Path) -> None:
    path.with_name("real").write_bytes(b"x")
    path.hardlink_to(path.with_name("real"))


@pytest.mark.parametrize(
    "make",
    [
        _symlink,
        _hard_link,
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: None,
    ],
    ids=["symlink", "hard link", "FIFO", "folder", "link to a device", "missing"],
)
def test_what_is_not_a_plain_file_is_refused_by_name_without_waiting(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    make(path)
    with within(1), pytest.raises(CheckpointError, match=r"/file: .*expected a regular file$"):
        read_regular_file(path, 100)


# Writing one file


def test_a_file_is_replaced_in_one_move_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    (tmp_path / ".tmp-run.json").write_bytes(b"left by a process that was killed")
    old = path.open("rb")
    replace_file(path, b"new")
    with old:
        assert old.read() == b"old"  # who had it open goes on reading the old file, not a mixture
    assert tree(tmp_path) == {"run.json": b"new"}


def test_equal_bytes_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    replace_file(path, b"same")
    os.utime(path, ns=(1, 1))
    before = path.stat()
    replace_file(path, b"same")
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino, after.st_ctime_ns) == (
        1,
        before.st_ino,
        before.st_ctime_ns,
    )


# Writing a folder

FILES = {"b.json": b"{}", "a.bin": bytes(3000), "manifest.json": b"last"}


class Disk:
    """Records, at the boundary to the operating system, what is flushed and renamed; and fails
    where asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], bool] = lambda call, name: False
        self._sync, self._rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)
        self.root = Path()

    def _happens(self, call: str, name: str) -> None:
        if self.fail(call, name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.events.append((call, name))

    def fsync(self, handle: int) -> None:
        inode, size = os.fstat(handle).st_ino, os.fstat(handle).st_size
        path = next(
            path for path in [self.root, *self.root.rglob("*")] if path.stat().st_ino == inode
        )
        name = str(path.relative_to(self.root))
        self._happens("fsync", f"{name} {size}" if path.is_file() else name)
        self._sync(handle)

    def rename(self, source: Path, target: Path) -> None:
        self._happens("rename", f"{Path(source).name} -> {Path(target).name}")
        self._rename(source, target)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    disk = Disk(monkeypatch)
    disk.root = tmp_path
    return disk


def test_a_folder_appears_whole_with_every_byte_and_name_on_disk_before_the_rename(
    disk: Disk, tmp_path: Path
) -> None:
    commit_folder(tmp_path / "step", FILES)
    assert disk.events == [
        ("fsync", ".tmp-step/b.json 2"),
        ("fsync", ".tmp-step/a.bin 3000"),
        ("fsync", ".tmp-step/manifest.json 4"),  # the last given is written last
        ("fsync", ".tmp-step"),
        ("rename", ".tmp-step -> step"),
        ("fsync", "."),
    ]
    assert tree(tmp_path) == {f"step/{name}": content for name, content in FILES.items()}


def test_a_replaced_file_is_on_disk_before_the_rename(disk: Disk, tmp_path: Path) -> None:
    replace_file(tmp_path / "run.json", b"12345")
    assert disk.events == [
        ("fsync", ".tmp-run.json 5"),
        ("rename", ".tmp-run.json -> run.json"),
        ("fsync", "."),
    ]


def test_a_folder_replaces_an_older_one_of_its_name_whole(tmp_path: Path) -> None:
    commit_folder(tmp_path / "step", {"old": b"1", "a.bin": b"2"})
    commit_folder(tmp_path / "step", FILES)
    assert tree(tmp_path) == {f"step/{name}": content for name, content in FILES.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


@pytest.mark.parametrize(
    "failing",
    [
        ("fsync", ".tmp-step/b.json 2"),
        ("fsync", ".tmp-step/a.bin 3000"),
        ("fsync", ".tmp-step/manifest.json 4"),
        ("fsync", ".tmp-step"),
        ("rename", "step -> .trash-step"),
        ("rename", ".tmp-step -> step"),
    ],
    ids=str,
)
def test_a_disk_that_fills_up_at_any_moment_leaves_the_older_folder_whole(
    disk: Disk, tmp_path: Path, failing: tuple[str, str]
) -> None:
    commit_folder(tmp_path / "step", {"old": b"1"})
    disk.fail = lambda call, name: (call, name) == failing
    with pytest.raises(
        EnvironmentFault, match=r"/step: not written: No space left on device; .* intact$"
    ) as refused:
        commit_folder(tmp_path / "step", FILES)
    assert refused.value.exit_code == 5
    assert tree(tmp_path) == {"step/old": b"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_a_real_limit_on_file_sizes_leaves_the_older_folder_whole(tmp_path: Path) -> None:
    commit_folder(tmp_path / "step-1", {"old": b"1"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a.bin has 3,000 bytes
    try:
        with pytest.raises(
            EnvironmentFault, match="step-2: not written: File too large"
        ) as refused:
            commit_folder(tmp_path / "step-2", FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.exit_code == 5
    assert tree(tmp_path) == {"step-1/old": b"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_a_folder_that_takes_no_names_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_bytes(b"a file in the way")
    with pytest.raises(EnvironmentFault, match="not written"):
        commit_folder(tmp_path / "checkpoints" / "step", FILES)
    assert tree(tmp_path) == {"checkpoints": b"a file in the way"}


def test_a_removed_folder_loses_its_name_before_its_files(tmp_path: Path, disk: Disk) -> None:
    commit_folder(tmp_path / "step", FILES)
    disk.events.clear()
    remove_folder(tmp_path / "step")
    assert disk.events == [("rename", "step -> .trash-step")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "mode"), [(0o022, "-rw-r--r--"), (0o077, "-rw-------"), (0o002, "-rw-rw-r--")]
)
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: str) -> None:
    before = os.umask(umask)
    try:
        commit_folder(tmp_path / "step", {"a": b"1"})
        replace_file(tmp_path / "run.json", b"{}")
    finally:
        os.umask(before)
    assert [stat.filemode((tmp_path / name).stat().st_mode) for name in ("step/a", "run.json")] == [
        mode,
        mode,
    ]


# The folder of a run


def test_a_prepared_folder_is_swept_of_what_a_killed_process_left_and_of_nothing_else(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    folder = tmp_path / "run"
    for leftover in (".tmp-step-000002", ".trash-step-000001"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / "a").write_bytes(b"1")
    (folder / ".tmp-run.json").write_bytes(b"{")
    (folder / ".tmp-step-000003").symlink_to(outside)
    (folder / ".tmp-of-somebody").mkdir()
    (folder / "step-000001").mkdir()
    (folder / "notes.tmp").write_bytes(b"2")
    prepare_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".tmp-of-somebody",
        "notes.tmp",
        "step-000001",
    ]
    assert tree(outside) == {"precious": b"1"}


def test_a_prepared_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_way_of_the_folder_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(
        EnvironmentFault, match=rf"^output_dir: .*/{place}: .*; expected a writable folder$"
    ) as refused:
        prepare_folder(tmp_path / place)
    assert refused.value.exit_code == 5
    assert tree(tmp_path) == {"file": b"1"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(EnvironmentFault, match="Permission denied; expected a writable folder"):
        prepare_folder(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_folder_that_cannot_flush_or_rename_is_refused(
    disk: Disk, tmp_path: Path, failing: str
) -> None:
    disk.fail = lambda call, name: call == failing
    with pytest.raises(
        EnvironmentFault, match="No space left on device; expected a writable folder"
    ):
        prepare_folder(tmp_path)


# The lock of a run


def test_a_held_folder_is_refused_at_once_and_the_refusal_names_the_holder(tmp_path: Path) -> None:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with lock_folder(tmp_path / "a" / "run") as notice:
        assert notice is None
        with (
            within(1),
            pytest.raises(EnvironmentFault) as refused,
            lock_folder(tmp_path / "a" / "run"),
        ):
            pass
        assert tree(tmp_path) == {"a/run/.lock": holder.encode()}  # the refusal has changed nothing
    assert refused.value.exit_code == 5
    said = f"output_dir: {tmp_path}/a/run is written to by {holder}; wait for it or stop it"
    assert str(refused.value) == said


def test_a_folder_that_was_let_go_of_is_taken_without_a_word(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_folder(tmp_path) as notice:
            assert notice is None
        assert tree(tmp_path) == {".lock": b""}
    with pytest.raises(ValueError, match="inside"), lock_folder(tmp_path):
        raise ValueError("inside")
    assert tree(tmp_path) == {".lock": b""}


@pytest.mark.parametrize(
    ("left", "holder"),
    [
        (b"process 4711 on elsewhere", "process 4711 on elsewhere"),
        ("process 1 on bücher".encode(), "process 1 on bücher"),
        (
            b"process 1 on b\xfccher",
            "process 1 on b\ufffdcher",
        ),  # what a crash of the machine left may be anything
    ],
)
def test_a_holder_that_died_is_named_to_the_next_one(
    tmp_path: Path, left: bytes, holder: str
) -> None:
    (tmp_path / ".lock").write_bytes(left)
    with lock_folder(tmp_path) as notice:
        assert notice == f"{holder} ended without letting go of {tmp_path}: taken over"
        assert tree(tmp_path) == {
            ".lock": f"process {os.getpid()} on {socket.gethostname()}".encode()
        }
    assert tree(tmp_path) == {".lock": b""}


def test_a_holder_that_has_not_yet_written_its_name_is_refused_too(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(EnvironmentFault, match="is written to by another run; wait"),
            lock_folder(tmp_path),
        ):
            pass


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOLCK, "No locks available"), (errno.EOPNOTSUPP, "Operation not supported")],
)
def test_a_file_system_without_locks_is_refused_and_not_taken_for_a_held_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(EnvironmentFault, match=rf"cannot be locked: {said}; use another$"),
        lock_folder(tmp_path),
    ):
        pass


@pytest.mark.parametrize("place", ["file", "file/run", "folder"])
def test_a_folder_that_cannot_take_a_lock_file_is_refused_by_name(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(
            EnvironmentFault, match=rf"^output_dir: .*/{place}: .*; expected a writable folder$"
        ) as refused,
        lock_folder(tmp_path / place),
    ):
        pass
    assert refused.value.exit_code == 5
    assert tree(tmp_path) == {"file": b"1"}


# The lock between real runs


@pytest.fixture(scope="module")
def knobs(bloom: Path, ragged: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": bloom, "dataset_name": ragged, "max_length": 128, "micro_batch_tokens": 256,
        "global_batch_size": 8, "max_steps": 60, "learning_rate": 0.01, "lora_r": 4,
        "lora_target_modules": "all-linear", "save_steps": 5,
    }  # fmt: skip


@pytest.mark.runs
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_start_is_refused_with_the_firsts_name_and_after_a_kill_the_next_takes_over(
    num_processes: int, knobs: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "output_dir": folder})
    first = start(argv, tmp_path / "first", num_processes)
    assert wait_until(lambda: size(folder / "ledger.jsonl") > 0, first), first.text()
    holder = f"process {first.processes[0].pid} on {socket.gethostname()}"
    for process in first.processes:  # as slow as it takes: the second start finds it at work
        os.kill(process.pid or 0, signal.SIGSTOP)
    second = start(argv, tmp_path / "second", num_processes)
    assert second.wait(60) == ([5] if num_processes == 1 else [5, 1]), second.text()
    said = [line for line in second.text().splitlines() if line.startswith("error: ")]
    assert (
        said[0] == f"error: output_dir: {folder} is written to by {holder}; wait for it or stop it"
    )
    assert said[1:] == ["error: another process ended; its own message says why"] * (
        num_processes - 1
    )
    assert "Traceback" not in second.text()
    assert (folder / ".lock").read_text() == holder
    first.kill()
    third = run(argv, tmp_path / "third", num_processes)
    assert third.text().count(f"{holder} ended without letting go of {folder}: taken over") == 1
    assert third.text().count("taken over") == 1
    assert (folder / ".lock").read_bytes() == b""
    assert "taken over" not in run(argv, tmp_path / "fourth", num_processes).text()
    straight = {**knobs, "output_dir": tmp_path / "straight"}
    run(flags(straight), tmp_path / "log", num_processes)
    assert_same_run(folder, tmp_path / "straight")


@pytest.mark.runs
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_whose_folder_is_removed_ends_at_its_next_save_and_makes_no_new_one(
    num_processes: int, knobs: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "output_dir": folder, "max_steps": 100_000, "save_steps": 20})
    launched = start(argv, tmp_path / "log", num_processes)
    saved, ledger = folder / "checkpoints" / "step-000020", folder / "ledger.jsonl"
    assert wait_until(lambda: saved.exists() and ledger.read_bytes().count(b"\n") > 20, launched), (
        launched.text()
    )
    folder.rename(tmp_path / "going")  # so that no save falls into the middle
    shutil.rmtree(tmp_path / "going")
    assert launched.wait(60) == ([5] if num_processes == 1 else [5, 1]), launched.text()
    said = [line for line in launched.text().splitlines() if line.startswith("error: ")]
    assert said[0].endswith(
        "not written: No such file or directory; what was saved before is intact"
    )
    assert "Traceback" not in launched.text()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("content", "digest"),
    [  # FIPS 180-2
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ],
)
def test_sha256_is_the_standards(content: bytes, digest: str) -> None:
    assert sha256(content) == digest
