"""From a folder of published weights through commands: it begins a run under any layout, is
evaluated and continued like a run, and comes out again as it went in.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.families.names import respelled
from tests.published import in_fp32, published
from train.pretrained.described import describe

sys.path.insert(0, str(Path(__file__).parent))
from commandline import last_json, launch, losses, train_on, write_text

pytestmark = [pytest.mark.slow]
TRAIN = (
    "train.seq_len=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.log_interval=1",
    "train.num_steps=3",
    "optim.warmup_steps=1",
    "optim.lr=0.01",
    "train.eval_max_sequences=4",
    "tracker.wandb.mode=disabled",
    "balance=none",  # its loss is of a micro-batch, and so another one under each layout
)
STILL = ("optim.lr=1e-38", "optim.min_lr=0", "optim.weight_decay=0")
"""A step that leaves every weight as it is: none of them is so small."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return published("qwen3_moe", tmp_path_factory.mktemp("published") / "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def begun(qwen, text, tmp_path_factory) -> Path:
    """A run of three steps on one rank."""
    run = tmp_path_factory.mktemp("begun") / "run"
    saved = "checkpoint.save_interval=1"
    launch("train", f"init.path={qwen}", *text, *TRAIN, saved, f"run_dir={run}")
    return run


def test_what_is_prepared_ahead_is_what_the_run_reads(qwen, text, begun):
    ahead = last_json(launch("prepare", f"init.path={qwen}", *text))
    read = json.loads((begun / "data/manifest.json").read_text())
    assert ahead["fingerprint"] == read["fingerprint"]
    # the same tokenizer without the end-of-text token of the model's config.json
    alone = last_json(launch("prepare", f"data.tokenizer.path={qwen}", *text))
    assert alone["end_of_document"] != read["end_of_document"]


LAYOUTS = [(1, 2, 1), (2, 2, 2), (0, 2, 1), (3, 2, 2)]
"""ZeRO stage, ranks, expert-parallel size: each stage once, each expert-parallel size twice."""


@pytest.mark.parametrize(("stage", "ranks", "experts"), LAYOUTS)
def test_any_layout_begins_with_the_same_weights(
    qwen, text, begun, tmp_path, stage, ranks, experts
):
    _any_layout(qwen, text, begun, tmp_path, stage, ranks, experts)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("stage", "ranks", "experts"),
    [
        (stage, ranks, experts)
        for stage in range(4)
        for ranks, experts in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
        if (stage, ranks, experts) not in LAYOUTS
    ],
)
def test_every_layout_begins_with_the_same_weights(
    qwen, text, begun, tmp_path, stage, ranks, experts
):
    _any_layout(qwen, text, begun, tmp_path, stage, ranks, experts)


def _any_layout(qwen, text, begun, tmp_path, stage, ranks, experts):
    train_on(
        ranks,
        f"init.path={qwen}",
        *text,
        *TRAIN,
        f"parallel.expert_parallel_size={experts}",
        f"deepspeed=zero{stage}",
        f"run_dir={tmp_path / 'run'}",
    )
    expected, found = losses(begun), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert found[1] == pytest.approx(expected[1], abs=2e-6)  # before any update
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)


def test_held_out_loss_and_greedy_text_are_those_of_transformers(qwen, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox, or not the fox: that was the question.")
    result = last_json(launch("evaluate", f"path={qwen}", f"text={text}", "seq_len=64"))

    model = transformers.AutoModelForCausalLM.from_pretrained(
        qwen, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    ids = torch.tensor([tokenizer(text.read_text(), add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    assert result["val_loss"] == pytest.approx(loss, abs=2e-6)
    num_bytes = len(text.read_text()) - len(tokenizer.decode(ids[0, :1]))
    nats = loss * (ids.numel() - 1)
    expected_bits = nats / num_bytes / torch.log(torch.tensor(2.0)).item()
    assert result["bits_per_byte"] == pytest.approx(expected_bits, rel=1e-5)

    prompt = "the quick brown"
    said = last_json(
        launch("generate", f"path={qwen}", f"prompt={prompt}", "temperature=0", "max_new_tokens=16")
    )
    start = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    wanted = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=1,
        pad_token_id=0,
        temperature=None,
    )
    new = wanted[0, start.shape[1] :].tolist()
    if 1 in new:
        new = new[: new.index(1)]
    assert said["text"] == Tokenizer.from_file(str(qwen / "tokenizer.json")).decode(new)


def test_shape_router_and_tokenizer_come_from_the_folder_and_stay_with_the_run(
    qwen, text, begun, tmp_path
):
    """The folder is needed once: a resumed run goes on without it, and exports its tokenizer."""
    folder = tmp_path / "moved"
    shutil.copytree(qwen, folder)
    run = tmp_path / "run"
    common = (*text, *TRAIN, f"run_dir={run}")
    launch("train", f"init.path={folder}", *common, "train.stop_after_step=1")
    shutil.rmtree(folder)
    launch("train", f"resume={run}", "train.stop_after_step=3")
    assert list(losses(run).values()) == pytest.approx(list(losses(begun).values()), abs=1e-6)

    done = last_json(launch("export", f"run={run}", f"to={tmp_path / 'out'}", "checkpoint=latest"))
    assert done["architecture"] == "Qwen3MoeForCausalLM"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (qwen / name).read_bytes()


@pytest.mark.parametrize(
    "case",
    [
        "qwen3_moe",
        "deepseek_v3, moonlight",
        *(
            pytest.param(case, marks=pytest.mark.nightly)
            for case in (
                *("dots1", "granitemoe", "gpt_oss", "glm4_moe", "llama 3.1"),
                "with hyper-connections, deepseek_v4",
            )
        ),
    ],
)
def test_a_folder_that_no_step_has_changed_comes_out_bit_for_bit(case, text, tmp_path):
    source = published(case, tmp_path / "in")
    run, out = tmp_path / "run", tmp_path / "out"
    settings = (*text, *TRAIN, *STILL, "train.num_steps=1", "optim.warmup_steps=0")
    precision = "train.precision=bf16" if case == "qwen3_moe" else "train.precision=fp32"
    launch("train", f"init.path={source}", *settings, precision, f"run_dir={run}")
    launch("export", f"run={run}", f"to={out}", "checkpoint=latest", "max_shard_size=0.00002")

    family = describe(source).reading.family
    before = {respelled(name, family): value for name, value in tensors(source).items()}
    after = tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == (torch.float32 if in_fp32(name) else tensor.dtype)
        assert torch.equal(after[name].to(tensor.dtype), tensor), name
    assert len(list(out.glob("*.safetensors"))) > 1

    # What users of the first folder had, users of the second have.
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "model_type"):
        assert new.get(key) == old.get(key), key
    chat = [{"role": "user", "content": "Hello"}]
    first, second = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, out))
    assert first("the fox").input_ids == second("the fox").input_ids
    assert first.apply_chat_template(chat, tokenize=False) == second.apply_chat_template(
        chat, tokenize=False
    )


@pytest.mark.nightly
def test_a_selection_bias_near_seven_keeps_every_digit_through_training_in_bf16(text, tmp_path):
    """In bf16 values near 7 are 1/32 apart, and most tokens would change experts."""
    source, run, out = published("dots1", tmp_path / "in"), tmp_path / "run", tmp_path / "out"
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for file in source.glob("*.safetensors"):
        if name in (found := load_file(file)):
            found[name] = 7 + 0.01 * torch.randn(len(found[name]))
            save_file(found, file, {"format": "pt"})
            bias = found[name]
    assert len(bias.bfloat16().unique()) < len(bias.unique()) == 8
    settings = (*text, *TRAIN, "train.precision=bf16", "optim.lr=1e-3")
    launch("train", f"init.path={source}", *settings, f"run_dir={run}")
    launch("export", f"run={run}", f"to={out}", "checkpoint=latest")
    assert torch.equal(tensors(out)[name], bias)


def test_an_export_that_fails_leaves_nothing(begun, tmp_path, monkeypatch):
    from train.pretrained import export as module

    run = tmp_path / "run"
    shutil.copytree(begun, run)
    seen = []

    def killed(folder: Path) -> dict:
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise KeyboardInterrupt

    from launch.saved.run import load_run
    from train.checkpoint.folder import find_checkpoint

    checkpoint = find_checkpoint(run)
    config = load_run(str(run), None, checkpoint)
    plan = module.plan_export(config)
    tokenizer = module.tokenizer_of(config, run)
    with pytest.raises(KeyboardInterrupt):
        module.export(
            plan,
            module.MergedReader(checkpoint),
            tokenizer,
            tmp_path / "out",
            "bf16",
            10**9,
            killed,
        )
    assert "config.json" in seen[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_mean_of_checkpoints_comes_out_as_a_folder(begun, tmp_path):
    """Every tensor is the mean of those that the single checkpoints come out as, and transformers
    computes it.
    """
    settings = [f"run={begun}", "dtype=fp32"]
    for step in (2, 3):
        chosen = f"checkpoint=step-0000000{step}"
        launch("export", *settings, chosen, f"to={tmp_path / str(step)}", "verify=false")
    launch("export", *settings, "checkpoint=latest", "average=2", f"to={tmp_path / 'mean'}")
    one, other = tensors(tmp_path / "2"), tensors(tmp_path / "3")
    found = tensors(tmp_path / "mean")
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        expected = ((one[name].double() + other[name].double()) / 2).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    facts = json.loads((tmp_path / "mean" / "loadstone.json").read_text())
    assert facts["averaged"] == ["step-00000003", "step-00000002"]
    assert facts["verified"]["largest_difference"] < 1e-4


@pytest.mark.nightly
def test_a_run_comes_out_in_8_bit_floats_and_in_again(begun, tmp_path):
    settings = [f"run={begun}", "checkpoint=latest"]
    launch("export", *settings, f"to={tmp_path / 'bf16'}", "verify=false")
    done = launch("export", *settings, f"to={tmp_path / 'fp8'}", "dtype=fp8")
    assert "engines that compute with these weights round activations" in done.stdout
    facts = json.loads((tmp_path / "fp8" / "loadstone.json").read_text())
    assert facts["verified"]["largest_difference"] < 1e-3
    assert 0 < facts["verified"]["moved"] < facts["verified"]["rounding"]
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("fp8", "bf16")
    ]
    assert sizes[0] < 0.8 * sizes[1]  # half of what is no embedding
    said = launch("generate", f"path={tmp_path / 'fp8'}", "prompt=the fox", "max_new_tokens=3")
    assert last_json(said)["text"]
    both = ("dtype=fp8", "adapter=true")
    refused = launch("export", *settings, f"to={tmp_path / 'x'}", *both, check=False)
    assert refused.returncode == 2
    assert "dtype=fp8 is of whole weights" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("model.num_layers=3",), "model.num_layers=3 contradicts init.path="),
        (("model=mixtral_8x7b",), "model.hidden_size=4096 contradicts init.path="),
        (("experiment=mixtral_8x7b",), "whose weights have 32; drop the choice of a model"),
        (("router.top_k=3",), "router.top_k=3 contradicts init.path="),
        (("router=sigmoid_top_k",), "router.score_function=sigmoid contradicts"),
        (("init.run=elsewhere",), "init.path and init.run are both set"),
        (("train.seq_len=65",), "train.seq_len 65 exceeds model.max_seq_len 64"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(qwen, text, tmp_path, settings, said):
    done = launch(
        "train",
        f"init.path={qwen}",
        *text,
        *TRAIN,
        *settings,
        f"run_dir={tmp_path / 'run'}",
        check=False,
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_settings_that_the_weights_bear_are_kept(qwen, text, tmp_path):
    run = tmp_path / "run"
    launch(
        "train",
        f"init.path={qwen}",
        *text,
        *TRAIN,
        "model.max_seq_len=128",
        "model.recompute=block",
        "router.capacity_factor=2.0",
        "router=top_p",
        "router.capacity_factor=2.0",
        "train.num_steps=1",
        "optim.warmup_steps=0",
        f"run_dir={run}",
    )
    config = (run / "checkpoints/step-00000001/config.yaml").read_text()
    for line in ("max_seq_len: 128", "recompute: block", "name: top_p", "capacity_factor: 2.0"):
        assert line in config, line
    # An adaptive router has no place in a config.json, and the way out is a command.
    refused = launch("export", f"run={run}", f"to={tmp_path / 'out'}", check=False)
    assert refused.returncode == 2 and "python -m launch.evaluate run=RUN router.top_k=2" in (
        refused.stderr
    )
    done = last_json(
        launch("export", f"run={run}", f"to={tmp_path / 'out'}", "router.top_k=2", "dtype=fp32")
    )
    assert done["verified"]["largest_difference"] < 1e-5


def test_a_bias_that_no_family_has_is_refused_before_anything_is_written(qwen, text, tmp_path):
    run = tmp_path / "run"
    balance = ("balance.bias_update=sign", "balance.bias_update_rate=0.01")
    launch("train", f"init.path={qwen}", *text, *TRAIN, *balance, f"run_dir={run}")
    done = launch("export", f"run={run}", f"to={tmp_path / 'out'}", check=False)
    assert done.returncode == 2
    assert "reaches" in done.stderr and "has no selection bias" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_begins_with_the_weights_of_another_run(begun, text, tmp_path):
    """Other rows, schedule and precision; the first loss is that of the weights."""
    run = tmp_path / "run"
    launch("train", f"init.run={begun}", "init.checkpoint=latest", *text, *TRAIN, f"run_dir={run}")
    again = tmp_path / "again"
    other = ("train.seq_len=16", "train.precision=bf16", "attention=scc", "attention.block_size=8")
    small = ("attention.coarse_block_size=4", "attention.window_size=8")
    launch("train", f"init.run={run}", *text, *TRAIN, *other, *small, f"run_dir={again}")

    # Held-out loss of the weights that it began with, and after a step that changes nothing.
    still = tmp_path / "still"
    one = ("train.num_steps=1", "optim.warmup_steps=0")
    began = launch(
        "train",
        f"init.run={begun}",
        "init.checkpoint=latest",
        *text,
        *TRAIN,
        *STILL,
        *one,
        f"run_dir={still}",
    )
    assert last_json(began)["val_loss"] == pytest.approx(
        json.loads((begun / "result.json").read_text())["val_loss"], abs=1e-6
    )
    # The tokenizer's files travel along.
    launch("export", f"run={still}", f"to={tmp_path / 'out'}", "checkpoint=latest")
    assert (tmp_path / "out/chat_template.jinja").is_file()

    wrong = launch("train", f"init.run={begun}", *text, *TRAIN, "model.num_layers=3", check=False)
    assert wrong.returncode == 2 and "model.num_layers=3 contradicts init.run=" in wrong.stderr
