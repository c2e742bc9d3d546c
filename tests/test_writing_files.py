"""Writers: what they refuse, what they keep, and what they say and leave when a write fails."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nested_learning import _files, _tensor_files
from nested_learning._files import put_folder, replacing, whole_folder, writable, write_bytes, write_text
from nested_learning._tensor_files import write_tensors
from nested_learning.cli.errors import message_of

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(3)}, {"format": "x"}),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


class TestRefused:
    def test_a_pipe(self, tmp_path, write):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe: it is a pipe; give the name of a regular file"):
            write(tmp_path / "pipe")
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
        assert os.listdir(tmp_path) == ["pipe"]

    def test_a_link_to_a_pipe(self, tmp_path, write):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("pipe")
        with pytest.raises(ValueError, match="it is a pipe"):
            write(tmp_path / "link")
        assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]

    def test_a_folder(self, tmp_path, write):
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "folder", tmp_path / "folder" / "..", tmp_path / "."):
            with pytest.raises(ValueError, match="it is a folder"):
                write(path)
        assert os.listdir(tmp_path) == ["folder"]

    def test_a_socket(self, tmp_path, write, monkeypatch):
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            with pytest.raises(ValueError, match="it is a socket"):
                write("socket")

    @pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
    def test_a_device(self, tmp_path, monkeypatch, write, kind):
        """Only said to be one: no test writes to a device."""
        path = tmp_path / "device"
        path.write_text("old")
        real = os.stat(path)
        told = os.stat_result((kind | 0o666, *real[1:]))
        monkeypatch.setattr(_files, "_status", lambda path: told)
        with pytest.raises(ValueError, match="it is a device"):
            write(path)
        assert path.read_text() == "old"

    def test_a_folder_that_is_missing(self, tmp_path, write):
        with pytest.raises(
            FileNotFoundError, match=r"cannot write .* there is no folder .*missing .*; make it first"
        ):
            write(tmp_path / "missing" / "file")
        assert not os.listdir(tmp_path)

    def test_a_circle_of_links(self, tmp_path, write):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match=r"(?i)too many levels|symbolic"):
            write(tmp_path / "a")
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]

    def test_a_file_that_is_write_protected(self, tmp_path, monkeypatch, write):
        """Said by `access`, since the tests may run as root, whom no mode stops."""
        path = tmp_path / "file"
        path.write_text("old")
        monkeypatch.setattr(os, "access", lambda path, kind: False)
        with pytest.raises(PermissionError, match="write-protected"):
            write(path)
        assert path.read_text() == "old"


class TestKept:
    def test_a_link_and_the_name_of_its_target(self, tmp_path, write):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "target").write_text("old")
        (tmp_path / "link").symlink_to("there/target")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert not (tmp_path / "there" / "target").is_symlink()
        assert (tmp_path / "there" / "target").read_bytes() != b"old"
        assert os.listdir(tmp_path / "there") == ["target"]

    def test_a_link_whose_target_is_to_come(self, tmp_path, write):
        (tmp_path / "link").symlink_to("target")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").is_file()

    @pytest.mark.parametrize("old", [0o600, 0o640, 0o664, 0o755])
    def test_the_mode_of_a_file(self, tmp_path, write, old):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(old)
        write(path)
        assert mode(path) == old

    def test_a_new_file_has_the_mode_of_any_new_file(self, tmp_path, write):
        (tmp_path / "other").write_text("x")
        write(tmp_path / "file")
        assert mode(tmp_path / "file") == mode(tmp_path / "other")

    def test_long_names(self, tmp_path, write):
        path = tmp_path / ("n" * 255)
        write(path)
        write(tmp_path / ("\u00e4" * 127))
        assert len(os.listdir(tmp_path)) == 2


class TestFailure:
    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
            (
                SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
                "full",
            ),
            (OSError(errno.EFBIG, "File too large"), "larger than its file system"),
        ],
    )
    def test_no_room(self, tmp_path, error, said):
        """By whomever it is said; the file that was there stays, and nothing else."""
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(OSError, match=said) as caught, replacing(path) as temporary:  # noqa: PT012
            temporary.write_bytes(b"half")
            raise error
        message = message_of(caught.value)
        assert message == str(caught.value)
        assert message.startswith(f"cannot write {path}: ")
        assert message.endswith("A file of that name is left as it was; make room and try again.")
        assert "damaged" not in message
        assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.parametrize(
        "text",
        [
            "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
            "basic_ios::clear: iostream error",
        ],
    )
    def test_torch_says_only_that_its_writer_is_lost(self, tmp_path, monkeypatch, text):
        error = RuntimeError(text)
        failure = _files.write_failure(error, tmp_path / "optimizer.pt", "It stands")
        assert "optimizer.pt: the system took only a part of it (" in str(failure)  # there is room
        monkeypatch.setattr(_files.shutil, "disk_usage", lambda path: type("usage", (), {"free": 4096}))
        failure = _files.write_failure(error, tmp_path / "optimizer.pt", "It stands")
        assert "optimizer.pt: the disk is full (4,096 bytes are free). It stands; make room" in str(failure)

    def test_other_errors_name_the_file_and_not_the_temporary_one(self, tmp_path):
        path = tmp_path / "file"
        with pytest.raises(PermissionError) as caught, replacing(path) as temporary:
            raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
        assert caught.value.filename == str(path)
        assert not os.listdir(tmp_path)

    def test_errors_of_others_pass(self, tmp_path):
        with pytest.raises(KeyError), replacing(tmp_path / "file"):
            raise KeyError("x")
        assert not os.listdir(tmp_path)

    def test_a_limit_of_the_process_for_real(self, tmp_path):
        """Bytes, text and tensors beyond what the system lets this process write."""
        code = f"""
import resource, sys, torch
sys.path.insert(0, {os.getcwd()!r})
from nested_learning._files import write_bytes
from nested_learning._tensor_files import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for write in (
    lambda: write_bytes("{tmp_path}/file", bytes(100_000)),
    lambda: write_tensors("{tmp_path}/file", {{"a": torch.ones(30_000)}}, {{}}),
):
    try:
        write()
    except OSError as error:
        print(error.errno, error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        )
        said = done.stdout.splitlines()
        assert len(said) == 2
        for line in said:
            assert line.startswith(f"{errno.EFBIG} cannot write {tmp_path}/file: the file is larger than")
        assert not os.listdir(tmp_path)


class TestFolder:
    def test_replaced_whole_or_left(self, tmp_path):
        path = tmp_path / "model"
        for text in ("first", "second"):
            with whole_folder(path) as folder:
                (folder / "file").write_text(text)
        with (  # noqa: PT012
            pytest.raises(OSError, match=r"model/config.json: the disk is full .*The last checkpoint stands"),
            whole_folder(path, "The last checkpoint stands") as folder,
        ):
            (folder / "config.json").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert (path / "file").read_text() == "second"
        assert os.listdir(tmp_path) == ["model"]

    def test_a_link_to_a_folder(self, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "model").symlink_to("there")
        with whole_folder(tmp_path / "model") as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == "x"

    def test_something_else_of_that_name(self, tmp_path):
        os.mkfifo(tmp_path / "model")
        with pytest.raises(ValueError, match="something else of that name"), whole_folder(tmp_path / "model"):
            pass
        assert os.listdir(tmp_path) == ["model"]

    def test_the_old_one_goes_last(self, tmp_path):
        for name in ("new", "old"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        put_folder(tmp_path / "new", tmp_path / "old")
        assert (tmp_path / "old" / "file").read_text() == "new"
        assert os.listdir(tmp_path) == ["old"]


def test_content(tmp_path):
    write_bytes(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    write_tensors(tmp_path / "tensors", {"a": torch.arange(3.0)}, {"note": "x"})
    assert torch.equal(load_file(tmp_path / "tensors")["a"], torch.arange(3.0))
    tensors, metadata = _tensor_files.read_tensors(tmp_path / "tensors", "test")
    _tensor_files.check_whole(tensors, metadata)
    _tensor_files.check_whole(tensors, {**metadata, "added": "later"})
    with pytest.raises(ValueError, match="does not have the checksum"):
        _tensor_files.check_whole(tensors, {**metadata, "note": "y"})
    assert writable(tmp_path / "new") == (tmp_path / "new").resolve()
