"""Low-rank adapters through commands: a run that trains them learns the same under every ZeRO
stage and expert parallelism, goes on bit for bit, and is read as a plain model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.published import published

sys.path.insert(0, str(Path(__file__).parent.parent / "end_to_end"))
from commandline import last_json, launch, losses, train_on, write_text

from model.lora import is_adapter
from train.checkpoint.folder import find_checkpoint
from train.checkpoint.reader import CheckpointReader

pytestmark = [pytest.mark.slow]
SETTINGS = (
    "lora.rank=2",
    "lora.alpha=8",
    "lora.targets=[attention,experts]",
    "balance=none",
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.log_interval=1",
    "train.num_steps=6",
    "train.eval_max_sequences=4",
    "optim.warmup_steps=2",
    "optim.lr=0.02",
    "tracker.wandb.mode=disabled",
)


def weights(run: Path, state: str = "fp32") -> dict[str, torch.Tensor]:
    """Every parameter of the newest checkpoint."""
    reader = CheckpointReader(find_checkpoint(run))
    want = {
        key: torch.empty(shape) for key, shape in reader.shapes.items() if key.endswith(f"/{state}")
    }
    reader.read(want)
    return {key.removesuffix(f"/{state}"): value for key, value in want.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return published("qwen3_moe", tmp_path_factory.mktemp("base") / "base", torch.float32)


@pytest.fixture(scope="module")
def settings(base, tmp_path_factory) -> list[str]:
    return [f"init.path={base}", *SETTINGS, *write_text(tmp_path_factory.mktemp("text"))]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """The run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    printed = launch("train", *settings, f"run_dir={run}")
    text = printed.stdout + printed.stderr
    assert "router frozen" in text and "experts frozen" in text and "lora " in text
    return run


def test_adapters_are_trained_and_nothing_else_is(alone, base, settings):
    after, moments = weights(alone), weights(alone, "exp_avg")
    assert set(moments) == {name for name in after if is_adapter(name)}
    assert all(value.any() for name, value in after.items() if "_b" in name and is_adapter(name))
    files = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    for ours, theirs in (
        ("blocks.1.attention.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("blocks.1.mlp.router.weight", "model.layers.1.mlp.gate.weight"),
        ("blocks.1.mlp.experts.down.5", "model.layers.1.mlp.experts.5.down_proj.weight"),
        ("embedding.weight", "model.embed_tokens.weight"),
    ):
        assert torch.equal(after[ours], files[theirs]), ours
    planned = last_json(launch("plan", *settings))
    numel = {name: value.numel() for name, value in after.items()}
    assert planned["trained_parameters"] == sum(numel[name] for name in moments)
    assert planned["memory_bytes"]["optimizer"] == 12 * planned["trained_parameters"]
    states = 12 * planned["trained_parameters"] + 4 * sum(
        number for name, number in numel.items() if not is_adapter(name)
    )
    assert planned["disk_bytes"]["checkpoints"]["each"] == states + 25_000


@pytest.mark.parametrize(
    ("stage", "experts"),
    [
        pytest.param(0, 2, id="zero0-ep2", marks=pytest.mark.nightly),
        pytest.param(1, 1, id="zero1-ep1", marks=pytest.mark.nightly),
        pytest.param(1, 2, id="zero1-ep2", marks=pytest.mark.nightly),
        pytest.param(2, 1, id="zero2-ep1", marks=pytest.mark.nightly),
        pytest.param(2, 2, id="zero2-ep2", marks=pytest.mark.nightly),
        pytest.param(3, 1, id="zero3-ep1", marks=pytest.mark.nightly),
        pytest.param(3, 2, id="zero3-ep2"),
    ],
)
def test_two_ranks_learn_and_resume_as_one_process(settings, alone, tmp_path, stage, experts):
    run = tmp_path / "run"
    where = [f"deepspeed=zero{stage}", f"parallel.expert_parallel_size={experts}"]
    train_on(2, *settings, *where, f"run_dir={run}", "train.stop_after_step=3")
    train_on(2, f"resume={run}")
    one, two = losses(alone), losses(run)
    assert list(two) == list(one)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-5)
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if is_adapter(name):
            assert torch.allclose(ours[name], value, rtol=1e-3, atol=2e-5), name
        else:
            assert torch.equal(ours[name], value), name


@pytest.mark.nightly
def test_a_resumed_run_goes_on_bit_for_bit(settings, alone, tmp_path):
    run = tmp_path / "run"
    launch("train", *settings, f"run_dir={run}", "train.stop_after_step=3")
    launch("train", f"resume={run}")
    assert losses(run) == losses(alone)
    ours, theirs = weights(run), weights(alone)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    other = launch("train", f"resume={run}", "lora.rank=4", "train.num_steps=8", check=False)
    assert other.returncode == 2 and "cannot change lora.rank 2 -> 4" in other.stderr


@pytest.mark.nightly
def test_adapters_of_attention_alone_leave_the_experts_out_of_the_optimizer(settings, tmp_path):
    """DeepSpeed insists on a group of experts where it knows of experts."""
    common = [*settings, "lora.targets=['*.q_proj','*.o_proj']", "train.num_steps=3"]
    launch("train", *common, f"run_dir={tmp_path / 'one'}")
    train_on(2, *common, "parallel.expert_parallel_size=2", f"run_dir={tmp_path / 'two'}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-5)


@pytest.fixture(scope="module")
def merged(alone, tmp_path_factory) -> Path:
    """The run as a folder of weights, its adapters added."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    printed = last_json(launch("export", f"run={alone}", f"to={folder}", "dtype=fp32"))
    assert printed["verified"]["largest_difference"] < 1e-4
    return folder


@pytest.mark.nightly
def test_other_commands_read_the_run_as_a_plain_model(alone, merged, tmp_path):
    """Held-out loss and greedy text, of the run and of the exported folder in transformers'
    shape.
    """
    evaluated = last_json(launch("evaluate", f"run={alone}", "max_sequences=4"))
    trained = json.loads((alone / "result.json").read_text())["val_loss"]
    assert evaluated["val_loss"] == pytest.approx(trained, abs=2e-6)
    ask = ("prompt=the quick brown", "temperature=0", "max_new_tokens=12")
    ours = last_json(launch("generate", f"run={alone}", *ask))["text"]
    assert ours == last_json(launch("generate", f"path={merged}", *ask))["text"]


@pytest.mark.nightly
def test_a_run_begins_with_the_weights_of_a_run_with_adapters(alone, settings, tmp_path):
    """They are added to the weights; adapters of the new run start anew."""
    trained = json.loads((alone / "result.json").read_text())["val_loss"]
    still = ("optim.lr=1e-38", "optim.min_lr=0", "train.num_steps=1", "optim.warmup_steps=0")
    for name, own in (("adapters", ["lora.rank=3"]), ("plain", ["lora.rank=0", "lora.alpha=16"])):
        own += [] if name == "adapters" else ["lora.targets=[attention]", "optim.weight_decay=0"]
        common = [s for s in settings if not s.startswith("init.path")]
        run = tmp_path / name
        launch("train", f"init.run={alone}", *common, *own, *still, f"run_dir={run}")
        found = json.loads((run / "result.json").read_text())["val_loss"]
        assert found == pytest.approx(trained, abs=2e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["balance=aux_loss"], "lora.rank 2 leaves the router as it is, but balance.aux_loss"),
        pytest.param(
            ["lora.targets=[attention,mlps]"],
            "mlps means no projection of this model",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["init.path=null", "model.vocab_size=300"],
            "begins with weights that are drawn",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_contradicts_is_refused_before_anything_starts(settings, tmp_path, change, said):
    done = launch("train", *settings, *change, f"run_dir={tmp_path / 'x'}", check=False)
    assert done.returncode == 2 and said in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()


def test_the_adapters_of_a_run_are_a_folder_in_pefts_layout(alone, base, tmp_path):
    """Held against the layout as peft reads it: A [E * r, in] by expert, B [out, r * E] by rank,
    both times alpha / r onto the stacks of transformers.
    """
    folder = tmp_path / "adapter"
    done = launch(
        "export", f"run={alone}", f"to={folder}", "adapter=true", "dtype=fp32", "verify=false"
    )
    assert last_json(done)["base"] == str(base)
    found = load_file(folder / "adapter_model.safetensors")
    after = weights(alone)
    a = found["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"]
    b = found["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"]
    for e in range(8):
        own = [after[f"blocks.1.mlp.experts.lora_gate_up_{letter}.{e}"] for letter in "ab"]
        assert torch.equal(a.view(8, 2, -1)[e], own[0])
        assert torch.equal(b.view(-1, 2, 8)[:, :, e], own[1])
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(found[name], after["blocks.0.attention.v_proj.lora_b"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == str(base)
    assert (folder / "chat_template.jinja").is_file() and (folder / "tokenizer.json").is_file()


@pytest.mark.nightly
def test_an_exported_adapter_is_verified_with_peft(alone, tmp_path):
    done = launch("export", f"run={alone}", f"to={tmp_path / 'adapter'}", "adapter=true")
    verified = last_json(done)["verified"]
    assert 0 < verified["largest_difference"] < 0.02 * verified["moved"]


@pytest.mark.nightly
def test_what_no_adapter_holds_is_refused(alone, settings, base, tmp_path):
    run = tmp_path / "run"
    common = ("train.num_steps=1", "optim.warmup_steps=0", f"run_dir={run}")
    launch("train", *settings, *common, "lora.also_train=[norms,router]")
    done = launch("export", f"run={run}", f"to={tmp_path / 'a'}", "adapter=true", check=False)
    assert done.returncode == 2 and "trained weights themselves" in done.stderr
    # The whole model holds them.
    launch("export", f"run={run}", f"to={tmp_path / 'b'}", "checkpoint=latest")
