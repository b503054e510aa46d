"""Folders from which libraries load compiled code are the user's own, or the command says which is
not.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.process.code_caches import ROOT, use_own_code_caches

NAMES = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")


def test_nothing_is_looked_for_in_a_place_where_others_write(tmp_path):
    """torch's own choice for its compiler is /tmp/torchinductor_USER, which anybody can make
    first.
    """
    environ = {"TRITON_HOME": str(tmp_path)}
    use_own_code_caches(environ)
    assert {
        name: Path(folder).is_relative_to(ROOT) for name, folder in environ.items() if name in NAMES
    } == {"TORCH_EXTENSIONS_DIR": True, "TORCHINDUCTOR_CACHE_DIR": True}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_everybody_can_write_is_refused(tmp_path, name):
    environ = {"TRITON_HOME": str(tmp_path), name: str(tmp_path / "shared")}
    use_own_code_caches(environ)  # not there yet: the library makes it
    (tmp_path / "shared").mkdir(mode=0o700)
    use_own_code_caches(environ)
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(ValueError, match=f"{name}=.*can be written by everybody.*of your own"):
        use_own_code_caches(environ)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_another_user_is_refused(tmp_path, name):
    (tmp_path / "theirs").mkdir(mode=0o755)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(ValueError, match="belongs to user 65534"):
        use_own_code_caches({"TRITON_HOME": str(tmp_path), name: str(tmp_path / "theirs")})


def test_the_default_of_triton_is_looked_at_too(tmp_path):
    (tmp_path / ".triton" / "cache").mkdir(parents=True)
    (tmp_path / ".triton" / "cache").chmod(0o777)
    with pytest.raises(ValueError, match=r"TRITON_CACHE_DIR=.*written by everybody"):
        use_own_code_caches({"TRITON_HOME": str(tmp_path)})
