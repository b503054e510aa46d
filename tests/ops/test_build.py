"""A compiled library is loaded only when it is this user's and what the compiler wrote."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest

from ops.compile import cuda as build


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """compiled() -> path of a small library, built where it is not there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("LOADSTONE_KERNELS", str(tmp_path / "kernels"))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return lambda: build.compile_library("answer", [source], [compiler, "-shared", "-fPIC"])


def test_a_library_is_compiled_once(compiled):
    first = compiled()
    written = first.stat().st_mtime_ns
    assert compiled() == first and first.stat().st_mtime_ns == written
    assert ctypes.CDLL(str(first)).answer() == 42


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit", "empty", "no checksum"])
def test_a_damaged_library_is_built_again_and_said_to_be(compiled, caplog, damage):
    path = compiled()
    whole = path.read_bytes()
    if damage == "no checksum":
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes(
            {
                "cut short": whole[: len(whole) // 2],
                "empty": b"",
                "a flipped bit": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
            }[damage]
        )
    with caplog.at_level("WARNING", logger="loadstone"):
        assert compiled() == path
    assert path.read_bytes() == whole and "built again" in caplog.text


@pytest.mark.parametrize("which", ["folder", "library"])
def test_a_library_that_others_can_write_is_not_loaded(compiled, which):
    path = compiled()
    (path.parent if which == "folder" else path).chmod(0o777)
    with pytest.raises(build.BuildError, match="LOADSTONE_KERNELS"):
        compiled()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_library_of_another_user_is_not_loaded(compiled):
    path = compiled()
    os.chown(path, 65534, 65534)
    with pytest.raises(build.BuildError, match="belongs to user 65534"):
        compiled()
