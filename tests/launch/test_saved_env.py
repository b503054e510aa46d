"""Variables of a resumed run that could load code or redirect credentials need a word on the
command line.
"""

from __future__ import annotations

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from launch.saved.environment import is_risky, require_confirmed
from launch.saved.resume import with_saved_config


@pytest.mark.parametrize(
    "name",
    [
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "PYTHONHOME",
        "PYTHONWARNINGS",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "LD_AUDIT",
        "PATH",
        "HOME",
        "WANDB_BASE_URL",
        "HF_ENDPOINT",
        "HTTPS_PROXY",
        "https_proxy",
        "ALL_PROXY",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "NETRC",
        "NCCL_NET_PLUGIN",
        "NCCL_TUNER_PLUGIN",
        "NCCL_NET",
        "NCCL_CONF_FILE",
        "TRITON_CACHE_DIR",
        "TORCH_EXTENSIONS_DIR",
        "CXX",
        "CC",
        "TORCHINDUCTOR_CACHE_DIR",
        "LOADSTONE_KERNELS",
        "XDG_CACHE_HOME",
        "HF_HOME",
        "TMPDIR",
        "BASH_ENV",
        "DS_ENV_FILE",
        "GCONV_PATH",
        "TRITON_PTXAS_PATH",
        "CUDA_HOME",
        "WANDB_DIR",
        "GIT_SSH_COMMAND",
        "MASTER_ADDR",
        "CUDA_INJECTION64_PATH",
        "TRITON_HOME",
    ],
)
def test_what_loads_code_or_sends_things_elsewhere_is_risky(name):
    assert is_risky(name)


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_HCA",
        "OMP_NUM_THREADS",
        "CUDA_LAUNCH_BLOCKING",
        "GLOO_SOCKET_IFNAME",
        "TOKENIZERS_PARALLELISM",
        "MY_SETTING",
        "PYTHONHASHSEED",
        "WANDB_MODE",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUDA_VISIBLE_DEVICES",
        "LANG",
        "TZ",
    ],
)
def test_settings_of_speed_and_logs_are_not(name):
    assert not is_risky(name)


SAVED = {
    "launch": {
        "env": {
            "PYTHONPATH": "/elsewhere",
            "WANDB_BASE_URL": "http://elsewhere",
            "NCCL_DEBUG": "INFO",
        }
    }
}


def test_what_the_command_line_does_not_repeat_is_shown_and_refused():
    with pytest.raises(
        ValueError,
        match=r"PYTHONPATH=/elsewhere, WANDB_BASE_URL=http://elsewhere.*\+launch.env.PYTHONPATH",
    ) as error:
        require_confirmed(SAVED, ["resume=run", "++optim.lr=1"], "run")
    assert "NCCL_DEBUG" not in str(error.value)
    with pytest.raises(ValueError, match="sets WANDB_BASE_URL=") as error:
        require_confirmed(SAVED, ["+launch.env.PYTHONPATH=/mine"], "run")


@pytest.mark.parametrize(
    "overrides",
    [
        ["++launch.env.PYTHONPATH=/elsewhere", "+launch.env.WANDB_BASE_URL=http://elsewhere"],
        ["launch.env={}"],
    ],
)
def test_what_the_command_line_says_itself_is_its_own(overrides):
    require_confirmed(SAVED, overrides, "run")


@pytest.mark.parametrize(
    "saved",
    [None, {}, {"launch": None}, {"launch": {"env": None}}, {"launch": {"env": ["PYTHONPATH"]}}],
)
def test_a_config_without_variables_has_nothing_to_confirm(saved):
    require_confirmed(saved, [], "run")


def test_a_resume_looks_before_anything_is_applied(tmp_path, monkeypatch):
    """A copy of a stranger's run is the user's own, and its variables reached the ranks."""
    (tmp_path / "config.yaml").write_text("launch: {env: {PYTHONPATH: elsewhere}}\n")
    monkeypatch.setattr(
        HydraConfig,
        "get",
        lambda: OmegaConf.create({"overrides": {"task": [f"resume={tmp_path}"]}}),
    )
    with pytest.raises(ValueError, match="sets PYTHONPATH=elsewhere"):
        with_saved_config(OmegaConf.create({"resume": str(tmp_path), "run_dir": None}))
