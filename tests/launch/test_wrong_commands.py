"""Wrong commands that a person would type: each is answered by one clear line that names the value
and the mend, with exit code 2, without a traceback. And right ones that Hydra alone would refuse.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from launch.command.arguments import (
    ArgumentError,
    arranged,
    refuse_two_values,
    replaced,
    require_sweep,
    setting,
)
from launch.config.overrides import plain, quoted
from launch.saved.run import require_budget
from model.routers.config import ROUTERS
from tests import forked
from tests.composing import composed
from tests.end_to_end.commandline import ROOT, launch

WRONG: dict[str, str] = {
    # a key of another framework, or in another place
    "train.lr=1e-3": "unknown key train.lr: did you mean optim.lr?",
    "optim.learning_rate=1e-3": "unknown key optim.learning_rate: did you mean optim.lr?",
    "launch.num_gpus=8": "unknown key launch.num_gpus: did you mean launch.num_devices?",
    "checkpoint.interval=100": "did you mean checkpoint.save_interval?",
    "lr=1e-3": "unknown key lr: did you mean optim.lr?",
    "learning_rate=1e-3": "did you mean optim.lr?",
    "batch_size=32": "did you mean train.global_batch_size?",
    "train.batch_size=32": "did you mean train.global_batch_size?",
    "num_gpus=8": "did you mean launch.num_devices?",
    "max_steps=100": "did you mean train.num_steps?",
    "train.max_steps=100": "did you mean train.num_steps?",
    "num_steps=100": "did you mean train.num_steps?",
    "seq_len=512": "did you mean train.seq_len?",
    "train.sequence_length=512": "did you mean train.seq_len?",
    "model.dtype=bf16": "did you mean train.precision?",
    "optim.warmup=10": "did you mean optim.warmup_steps?",
    "output_dir=runs/a": "did you mean run_dir?",
    "parallel.ep_size=2": "did you mean parallel.expert_parallel_size?",
    "train.gradient_checkpointing=true": "did you mean model.recompute?",
    "train.max_grad_norm=1.0": "did you mean train.clip_grad_norm?",
    # a slip of the finger
    "trian.num_steps=3": "unknown key trian: did you mean train?",
    "train.num_step=5": "did you mean train.num_steps?",
    "optim.weigth_decay=0.1": "did you mean optim.weight_decay?",
    "model.num_layer=3": "did you mean model.num_layers?",
    "model.hiden_size=64": "did you mean model.hidden_size?",
    "balance.aux_loss_coef=0.1": "did you mean balance.aux_loss_coeff?",
    "tracker.wandb.projct=x": "did you mean tracker.wandb.project?",
    "data.sources.0.pth=json": "did you mean data.sources[0].path?",
    "routers=top_k": "unknown key routers: did you mean router?",
    # an option that does not exist
    "router=tresh": "router=tresh does not exist; did you mean router=threshold?",
    "router=switch": "choices: expert_choice, group_limited",
    "experiment=quick": "did you mean experiment=quickstart?",
    "model=llama": "model=llama does not exist;",
    "attention=flash": "choices: compressed, csa, csa2, dense",
    "launch=mpirun": "choices: deepspeed, inline, slurm, torchrun",
    "parallel=ep3": "did you mean parallel=ep8?",
    "deepspeed=zero4": "deepspeed=zero4 does not exist; did you mean",
    "optim=sgd": "optim=sgd does not exist; choices: adamw",
    # a setting that nothing reads
    "budget.kp=1": "nothing reads budget.kp: router=top_k holds no budget; leave it out, or choose",
    # a setting of something else
    "router.budget=2": "router.budget is no setting of router=top_k, but of top_p, threshold,",
    "router.top_p=0.5": "router.top_p",
    "attention.top_k=8": "attention.top_k is no setting of attention=dense, but of scc",
    "attention.block_size=64": "add attention=scc",
    "train.steps=10": "did you mean train.num_steps?",
    "tokenizer=gpt2": "did you mean data.tokenizer.path?",
    "optim.betas=[0.9,0.95]": "did you mean optim.beta1 and optim.beta2?",
    "zero_stage=3": "did you mean deepspeed=zero1, zero2 or zero3?",
    "parallel.tp=2": "did you mean parallel.tensor_parallel_size?",
    "balance.coef=0.01": "did you mean balance.aux_loss_coeff?",
    "deepspeed=3": "deepspeed=3 does not exist; did you mean deepspeed=zero3?",
    "data=/data/a.txt": "data.sources.0.path=text data.sources.0.data_files=/data/a.txt",
    "data.sources.path=text": "data.sources is a list; write data.sources.0.path=text",
    "resume=true": "resume=true: true does not exist; python -m launch.runs lists the runs",
    "data=my.txt": "data.sources.0.path=text data.sources.0.data_files=my.txt",
    "data.path=my.txt": "unknown key data.path: did you mean data.sources.0.path?",
    "resume=latset": "resume=latset: latset does not exist; did you mean resume=latest?",
    "parallel=ep2": "start 2: launch=deepspeed launch.num_devices=2; or give parallel=single",
    # the form
    "--nproc_per_node=8": "settings have no dashes; write launch.num_devices=8",
    "--config=moe.yaml": "put the file into conf/experiment",
    "config=moe.yaml": "put the file into conf/experiment",
    "help": "--help lists them",
    "runs/a": "a run is named as run=runs/a",
    "--version": "--version is no option",
    "optim.lr": "optim.lr has no value; write optim.lr=VALUE",
    "train": "train has no value; write train=VALUE",
    "--optim.lr=1e-3": "settings have no dashes; write optim.lr=1e-3",
    "--lr=1e-3": "settings have no dashes; write optim.lr=1e-3",
    "--epochs": "settings have no dashes; write train.num_epochs=VALUE",
    "optim.lr=1e-3,1e-4": "-m optim.lr=1e-3,1e-4 runs a job for each",
    "~alarms.nothing": "there is no such setting to leave out",
    "=": "a setting is written without spaces",
    "5": "5 is no setting",
    # a value
    "train.num_steps=many": "train.num_steps is 'many'; it must be a whole number",
    "train.num_steps=1e3": "train.num_steps is 1000.0; it must be a whole number; write 1000",
    "tracker.wandb=off": "it must be a group of settings, such as tracker.wandb.mode",
    "train.num_steps=1.5": "train.num_steps is 1.5; it must be a whole number",
    "train.precision=fp16": "train.precision is 'fp16'; choose one of fp32, bf16",
    "optim.lr=": "optim.lr is ''; it must be a number",
    "train.deterministic=maybe": "train.deterministic is 'maybe'; it must be true or false",
    "model.num_heads=[4,4]": "model.num_heads is [4, 4]; it must be a whole number",
    "data.sources=json": "data.sources is 'json'; it must be a list",
    "train=5": "train is 5; it must be a group of settings",
    "optim.lr=inf": "optim.lr is inf; it must be a finite number",
    "seed=-1": "seed is -1; it must be between 0 and",
    "data.sources.0.path=jsonl": "data.sources[0].path is 'jsonl', no format; did you mean json?",
    "resume=runs/none/latest": "resume=runs/none/latest: there is no run under runs/none",
    "init.checkpoint=newest": "init.checkpoint is 'newest'; choose one of best, latest, or a name",
    "train.num_tokens=lots": "train.num_tokens is 'lots'; it must be a whole number",
    "optim.warmup_fraction=5": "optim.warmup_fraction is 5.0; it must be at least 0 and below 1",
    "train.global_batch_size=33": "train.global_batch_size 33 is not a multiple of",
}


def some(arguments: list) -> list:
    """All of them nightly, every third daily."""
    return [
        argument if place % 3 == 0 else pytest.param(argument, marks=pytest.mark.nightly)
        for place, argument in enumerate(arguments)
    ]


@pytest.mark.parametrize("argument", some(list(WRONG)))
def test_it_is_answered_by_a_line_with_the_mend(argument):
    done = launch("train", argument, "launch.dry_run=true", check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr
    assert any(WRONG[argument] in line for line in lines), lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines


OF_A_RUN = {
    ("evaluate", "run=latset"): "run=latset: latset does not exist; did you mean run=latest?",
    ("generate", "run=README.md", "prompt=x"): "README.md is a file, no run directory;",
    ("serve", "run=nowhere"): "nowhere does not exist; python -m launch.runs lists the runs",
    ("evaluate", "model=a"): "run=RUN or path=DIR names one that is trained",
    ("generate", "run=conf", "prompt", "ROMEO."): "prompt has no value; write prompt=ROMEO.",
    ("prepare", "train.num_steps=5"): "train is read by launch.train alone; leave it out",
    ("evaluate", "run=tests", "path=y"): "run and path are both set; drop one",
    ("branch", "run=conf", "checkpoint=step-9"): "give run=RUN, checkpoint=step-N, to=DIR and",
    ("export", "run=conf", "to=new", "checkpoint=step-9"): "checkpoints has no step-00000009;",
}


OF_COMMANDS = {
    ("train", "run=latest"): "unknown key run: did you mean resume?",
    ("train", "--run", "latest"): "settings have no dashes; write resume=latest",
    ("train", "init.path=meta-llama/Llama-2-7b"): "hf download meta-llama/Llama-2-7b --local-dir",
    ("train", "model.num_heads=3"): "model.hidden_size 256 is not divisible by model.num_heads 3",
    ("train", "data.mixture.temperature=0"): "temperature is 0.0; it must be positive, or null",
    ("train", "data.streaming=true", "train.num_epochs=1"): "nobody knows how long a pass over a",
    ("generate", "run=conf", "prompt=x", "max_new_tokens=-5"): "is -5; it must be at least 1",
    ("generate", "run=conf", "prompt=x", "temperature=hot"): "temperature is 'hot'; it must be a",
    ("generate", "run=conf", "prompt=x", "top_p=2"): "top_p is 2.0; it must be in (0, 1]",
    (
        "generate",
        "run=conf",
        "prompt=x",
        "device=cuda",
    ): "unknown key device: known keys: attention",
    (
        "generate",
        "run=conf",
    ): "give run=RUN (or path=DIR) and prompt='...', or input=FILE output=FILE",
    ("generate", "path=tests", "prompt=x"): "tests/config.json does not exist; give a folder",
    ("serve", "run=conf", "serve.port=abc"): "serve.port is 'abc'; it must be a whole number",
    (
        "serve",
        "run=conf",
        "serve.port=99999",
    ): "serve.port is 99999; it must be between 0 and 65535",
    ("serve", "run=conf", "port=8000"): "unknown key port: did you mean serve.port?",
    ("serve", "run=conf", "serve.budget=1.5"): "serve.budget is 1.5; choose one of auto",
    (
        "evaluate",
        "run=conf",
        "checkpoint=last",
    ): "choose one of best, latest, or a name such as step-",
    ("evaluate", "path=tests", "text=no.txt"): "text=no.txt does not exist; give a file of text",
    ("quantize", "run=conf", "weights=int4"): "weights is 'int4'; choose one of int8, fp8",
    ("export", "run=conf", "to=docs"): "docs exists; give a folder that does not, or remove it",
    ("compare", "variants=[top_k,densee]"): "there is no conf/variant/densee.yaml; choices: adap",
    ("compare", "sizes=[huge]"): "there is no conf/size/huge.yaml; choices: small, tiny",
    ("runs", "where=val_loss"): "is no condition; give NAME<VALUE, =, !=, <=, >, >= or ~",
    ("runs", "run=conf", "tag=two words"): "tag is 'two words'; a tag is a word",
    ("plan", "device=H1000"): "device is 'H1000'; choose one of GB200,",
    ("plan", "parallel=auto"): "give world=N and device=H100 (or another) as well, or leave",
    (
        "plan",
        "world=8",
    ): "give parallel=auto and device=H100 (or another) as well, or leave world=8",
    ("report", "run=conf", "format=pdf"): "unknown key format: known keys: interval, output, png",
    ("doctor", "hostfile=/nothing"): "unknown key hostfile: did you mean launch.hostfile?",
    ("prepare", "data.tokenizer.path=gpt2"): "gpt2 does not exist; give a tokenizer.json or a",
    ("audit", "run=conf", "step=abc"): "step is 'abc'; it must be a whole number",
    ("benchmark", "run=conf", "rows=[0]"): "rows has 0; it must be at least 1",
    ("teach", "to=x"): "there is no teacher; give objective=distil and objective.run=RUN",
}


@pytest.mark.parametrize("typed", some(list(OF_COMMANDS)))
def test_every_command_answers_by_a_line(typed):
    done = launch(*typed, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("run=")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert any(OF_COMMANDS[typed] in line for line in lines), lines
    assert all(line.startswith("error: ") for line in lines), lines


@pytest.mark.parametrize("name", ROUTERS)
def test_a_budget_is_of_a_router_that_has_one(name):
    """Refused before a model is loaded or data are made."""
    router = object.__new__(ROUTERS[name])
    if "budget" in {field.name for field in dataclasses.fields(router)}:
        require_budget(SimpleNamespace(router=router))
    else:
        with pytest.raises(ValueError, match="trained with a fixed number of experts"):
            require_budget(SimpleNamespace(router=router))


@pytest.mark.parametrize("typed", OF_A_RUN)
def test_other_commands_answer_likewise(typed):
    done = launch(*typed, check=False)
    assert done.returncode == 2 and OF_A_RUN[typed] in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "typed",
    [
        ("train.num_steps=5", "train.num_steps=6"),
        ("data.sources.0.path=json", "data.sources[0].path=text"),
        ("alarms.mine.above=1", "+alarms.mine.above=2"),
        ("router=top_k", "optim.lr=1", "router=top_p"),
        ("-m", "seed=1,2", "seed=3,4"),
        ("prompt=a=b", "prompt=a=c"),
    ],
)
def test_a_setting_has_one_value(typed):
    first, second = typed[0 if "=" in typed[0] else 1], typed[-1]
    with pytest.raises(ArgumentError, match=re.escape(f"{first} and {second} give")):
        refuse_two_values(typed)


@pytest.mark.parametrize("typed", [[], ["seed=1"], ["seed=[1,2]", "router=top_p"]])
def test_a_sweep_over_nothing_is_refused(typed):
    with pytest.raises(ArgumentError, match=r"and none has several; write optim\.lr=1e-3,1e-4, or"):
        require_sweep(arranged(["-m", *typed]))
    done = launch("train", "-m", *typed, "launch.dry_run=true", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: -m runs a job for each value")


@pytest.mark.parametrize(
    "swept",
    ["seed=1,2", "router=top_k,top_p", "seed=range(1,3)", "seed=choice(1)", "hydra/sweeper=optuna"],
)
def test_what_is_swept_over_is_taken(swept):
    require_sweep(arranged(["-m", "optim.lr=1e-3", "~alarms.budget", swept]))


def test_a_command_refuses_two_values_of_a_setting():
    # launch() would leave out the first one
    done = forked.run("launch.train", ["seed=5", "seed=6"], {**os.environ}, 120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: seed=5 and seed=6 give seed two values; drop one\n"


def test_what_is_given_once_or_twice_alike_is_taken():
    taken = ["-m", "seed=1,2", "router=top_p", "router.top_p=0.5", "~alarms.budget", "-m", "a=1"]
    refuse_two_values([*taken, "a=1", "~alarms.budget"])
    again = replaced(["++run=x", "++checkpoint=latest", "checkpoints=1"], "checkpoint", "step-4")
    assert again == ["++run=x", "checkpoints=1", "checkpoint=step-4"]


@pytest.mark.parametrize("command", ["export", "quantize", "generate", "serve", "report", "place"])
def test_what_is_misspelt_is_told_beside_what_is_missing(command):
    done = launch(command, "outputs=x", check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, lines
    assert lines[0].startswith("error: unknown key outputs: ")
    assert lines[1].startswith("error: give run=")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--num_gpus", "8"], "write launch.num_devices=8"),
        (["--bf16"], "write train.precision=VALUE"),
        (["--resume", "latest"], "write resume=latest"),
        (["--router", "top_p"], "write router=top_p"),
        (["train.num_steps", "100"], "write train.num_steps=100"),
        (["train.num_steps", "seed=1"], "write train.num_steps=VALUE"),
    ],
)
def test_a_value_behind_its_name_is_put_beside_it(typed, told):
    with pytest.raises(ArgumentError, match=told):
        arranged(typed)


def test_a_command_without_settings_has_none():
    assert arranged([]) == [] and arranged(["seed=1"]) == ["++seed=1"]


def test_words_of_a_training_are_offered_to_a_training_alone():
    with pytest.raises(ArgumentError, match="--dtype is no option"):
        arranged(["--dtype"], "generate")
    with pytest.raises(ArgumentError, match="write run=latest"):
        arranged(["--run", "latest"], "generate")


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["train.lr=1e-3", "router=tresh", "--lr=1e-3"])
def test_it_takes_less_than_two_seconds_of_a_processor(argument):
    """In a process that has to import everything."""
    process = psutil.Popen(
        [sys.executable, "-m", "launch.train", argument],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert usage.ru_utime + usage.ru_stime < 2.0
    assert b"error: " in process.stderr.read()


def test_a_host_that_nobody_knows_is_told_before_a_run_directory_is_made(tmp_path):
    (tmp_path / "hosts").write_text("nobody.invalid slots=2\nother.invalid slots=2\n")
    job = ("launch=deepspeed", "launch.num_nodes=2", "launch.num_devices=2")
    where = (f"launch.hostfile={tmp_path / 'hosts'}", f"run_dir={tmp_path / 'run'}")
    done = launch("train", *job, *where, check=False)
    assert done.returncode == 2 and "host nobody.invalid has no address (" in done.stderr
    assert "Errno" not in done.stderr and not (tmp_path / "run").exists()


def test_a_sweep_of_mistakes_ends_as_each_of_them_would(tmp_path):
    done = launch("train", "-m", "seed=x,y", f"hydra.sweep.dir={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.count("it must be a whole number") == 2
    assert "2 job(s) of the sweep failed" in done.stderr
    told = [line for line in done.stderr.splitlines() if "seed=" in line]
    assert told == ["job 0 of the sweep: seed=x", "job 1 of the sweep: seed=y"]


# --- right ones -----------------------------------------------------------------------------------

TEXTS = (
    "To be, or not to be",
    "Hello (world)!",
    "a = b",
    "Café",
    "[Enter Romeo.]",
    "{so: it goes}",
    "null",
    "5",
    "it's",
    'say "hello"',
    "back\\slash",
    "${oc.env:HOME}",
    " leading and trailing ",
    "two\nlines",
    "~tilde",
    "key=value",
    "100%",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["prompt", "train.sample_prompt"])
def test_a_prompt_is_the_text_that_was_typed(text, key):
    if (key, text) == ("train.sample_prompt", "null"):
        pytest.skip("null is no prompt there")
    assert composed_text(f"{key}={text}", key) == text


def composed_text(argument: str, key: str):
    config = composed(setting(argument), command="generate" if key == "prompt" else "train")
    return plain(config)[key] if key == "prompt" else config.train.sample_prompt


def test_no_sample_is_null():
    assert composed_text("train.sample_prompt=null", "train.sample_prompt") is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.lr=1e-3,1e-4", "-m"],
        ["-m", "optim.lr=1e-3,1e-4"],
        ["optim.lr=1e-3,1e-4", "--multirun", "seed=1"],
    ],
)
def test_options_of_hydra_stand_anywhere(arguments):
    options = [a for a in arguments if a.startswith("-")]
    found = arranged(arguments)
    assert found[: len(options)] == options
    assert "++optim.lr=1e-3,1e-4" in found


def test_the_config_is_printed_wherever_it_is_asked_for():
    before = launch("train", "--cfg", "job", "seed=7").stdout
    assert launch("train", "seed=7", "--cfg", "job").stdout == before
    assert "seed: 7" in before


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("router=top_p", "router=top_p"),
        ("model.head_dim=32", "++model.head_dim=32"),
        ("data.sources[0].weight=2", "++data.sources.0.weight=2"),
        ("data.sources.0.weight=2", "++data.sources.0.weight=2"),
        ("run_dir=/tmp/with space/a", "++run_dir=/tmp/with space/a"),
        ("run_dir=/tmp/a (1)", f"++run_dir={quoted('/tmp/a (1)')}"),
        ("run_dir=/tmp/a(b", f"++run_dir={quoted('/tmp/a(b')}"),
        (
            "data.sources.0.data_files=[/d/*.jsonl,~/x?.json]",
            f"++data.sources.0.data_files=[{quoted('/d/*.jsonl')},"
            f"{quoted(os.path.expanduser('~/x?.json'))}]",
        ),
        ("+alarms.mine={metric: a.b}", "+alarms.mine={metric: a.b}"),
        ("~alarms.budget", "~alarms.budget"),
        ("hydra.sweep.dir=x", "hydra.sweep.dir=x"),
    ],
)
def test_a_setting_as_hydra_takes_it(typed, taken):
    assert setting(typed) == taken


def test_a_path_in_the_home_folder_is_that_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert (
        setting("data.tokenizer.path=~/tok")
        == f"++data.tokenizer.path={quoted('/home/somebody/tok')}"
    )


@pytest.mark.parametrize("argument", ["--lr=1", "optim.lr", "=", "a b"])
def test_what_is_no_setting_is_told(argument):
    with pytest.raises(ArgumentError):
        arranged([argument])
