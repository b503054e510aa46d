"""Every command that README.md and docs/ print: its settings are right (daily), and it runs, small
(nightly). tests/documented.py finds them.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests import documented
from tests.documented import Command
from tests.end_to_end.commandline import TINY, last_json, launch, train_on, write_text
from tests.pairwise import some_daily
from tests.published import published

COMMANDS = [command for page in documented.PAGES for command in documented.commands(page)]
OURS = list({(c.module, *c.overrides): c for c in COMMANDS if c.module}.values())
"""Each once, whichever page prints it last."""
PLANNED = ("launch.train", "launch.plan", "launch.prepare")
TARGETS = {
    line.partition(":")[0]
    for line in (documented.ROOT / "Makefile").read_text().splitlines()
    if re.match(r"[a-z-]+:", line)
}
UNTIL = {
    "watch=true": "watch=false",
    "launch.dry_run=false": "launch.dry_run=true",
    "profile.steps=[10,12]": "profile.steps=[2,3]",
}
"""Settings with which a command does not end by itself, or only after many steps."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What pages call RUN, RUN2, HOSTS, FILE, MODEL, DENSE and /data, in a folder."""
    folder = tmp_path_factory.mktemp("documented")
    train_on(
        1,
        *TINY,
        *write_text(folder),
        "train.num_steps=600",
        "train.stop_after_step=4",
        "checkpoint.save_interval=2",
        f"run_dir={folder / 'run'}",
    )
    shutil.copytree(folder / "run", folder / "run2")
    (folder / "data").mkdir()
    rows = [f'{{"text": "line {i} of a small corpus"}}\n' for i in range(400)]
    (folder / "data/part.jsonl").write_text("".join(rows))
    said = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    chats = "".join(f'{{"text": "line {i}", {said}}}\n' for i in range(400))
    (folder / "data/chats").mkdir()
    for name in ("data/chats.jsonl", "data/chats/part.jsonl"):
        (folder / name).write_text(chats)
    # A plan looks whether there are files, and does not open them.
    for name in ("data/part.idx", "data/part.bin"):
        (folder / name).touch()
    launch("place", f"run={folder / 'run'}", "expert_parallel_size=2")
    published("qwen3_moe", folder / "model", max_position_embeddings=8192)
    published("llama", folder / "dense", max_position_embeddings=8192, num_hidden_layers=3)
    (folder / "other.txt").write_text("the quick brown fox jumps over the lazy dog")
    (folder / "words").mkdir()
    (folder / "words/manifest.json").write_text('{"teacher": {}}')
    (folder / "prompts.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "a lazy"}\n')
    return folder


def filled(word: str, place: Path) -> str:
    """An argument with what its page leaves to the reader."""
    names = {
        r"\bRUN2\b": place / "run2",
        r"\bRUN(?!\w)": place / "run",
        r"\bHOSTS\b": place / "hosts",
        r"\bFILE\b": place / "run/placement.json",
        r"\bDIR\b": place / "own",
        r"(?<=resume=)NEW\b": place / "run",
        r"\bMODEL\b": place / "model",
        r"\bDENSE\b": place / "dense",
        r"\bCACHE\b": place / "words",
        r"\bTEXT\b": place / "other.txt",
        r"(?<==)K\b": 0,
        r"(?<==)HOST\b": "127.0.0.1",
        r"\bruns/(?:fixed|adaptive)\b": place / "run",
        r"(?<=[=:])/data\b": place / "data",
        r"(?<=path=)tokenizer\.json\b": place / "run/data/tokenizer.json",
        r"/shared\b": place / "shared",
        r"(?<!checkpoint=)(?<==)latest\b": place / "run",
        r"(?<=input=)(?:prompts|served)\.jsonl": place / "prompts.jsonl",
    }
    for name, value in names.items():
        word = re.sub(name, str(value), word)
    return word


def overrides_of(command: Command, place: Path) -> list[str]:
    """What the command line is for one job: of a sweep the first one, and as many ranks as a
    launcher that is written before would start.
    """
    words = [filled(word, place) for word in command.overrides]
    if {"-m", "--multirun"} & set(words):
        words = [word.split(",")[0] for word in words if word not in ("-m", "--multirun")]
    if command.starter in ("deepspeed", "torchrun", "srun"):
        number = re.search(r"(?:num_gpus|nproc-per-node|ntasks)[ =](\d+)", command.text)[1]
        words += ["launch=deepspeed", f"launch.num_devices={number}"]
    if any(word.startswith("parallel.placement=") for word in words):
        words += ["launch=deepspeed", "launch.num_devices=2", "parallel.expert_parallel_size=2"]
    if any(word.startswith("objective.run=") for word in words):
        # a student has its teacher's tokens, in rows that the teacher knows
        words += ["model.vocab_size=300", "train.seq_len=64"]
    # HOSTS names as many as the command asks for
    nodes = next((word for word in words if word.startswith("launch.num_nodes=")), "=4")
    number = int(nodes.rpartition("=")[2])
    (place / "hosts").write_text("".join(f"host{i} slots=8\n" for i in range(number)))
    begun = any(word.startswith("init.run=") for word in words)
    if begun and not any(word.startswith("train.seq_len=") for word in words):
        words.append("train.seq_len=64")  # what the run of this test knows
    return words


def ids(command: Command) -> str:
    return f"{Path(command.page).stem}: {command.text}"


OTHERS = [pytest.param(c, id=ids(c)) for c in OURS if c.module not in PLANNED]
TRAINING = [pytest.param(c, id=ids(c)) for c in OURS if c.module in PLANNED]


@pytest.mark.parametrize("command", some_daily(TRAINING, 8))
def test_what_trains_can_be_planned(command, place):
    # how data are prepared is no setting of a run
    own = ("inspect=", "prepare.") if command.module == "launch.prepare" else ()
    overrides = [word for word in overrides_of(command, place) if not word.startswith(own)]
    planned = launch("plan", *overrides, check=False)
    assert planned.returncode == 0, planned.stdout[-2000:] + planned.stderr[-2000:]
    assert last_json(planned)["problems"] == []


@pytest.mark.parametrize("command", some_daily(OTHERS, 3))
def test_the_settings_of_other_commands_exist(command, place):
    if command.module.startswith("bench."):
        path = documented.ROOT / command.module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir()
        return
    composed = launch(
        command.module.removeprefix("launch."), "--cfg", "job", *overrides_of(command, place)
    )
    assert composed.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.starter == "make"], ids=ids)
def test_make_has_the_target(command):
    targets = [word for word in command.text.split()[1:] if "=" not in word]
    assert targets and set(targets) <= TARGETS


def test_pages_print_commands_and_the_collector_reads_them(tmp_path):
    assert len(COMMANDS) > 60
    page = tmp_path / "page.md"
    page.write_text(
        "```\npython -m launch.train  a=1 \\\n    b='x y' ...   # why\nnot a command\n```\n"
        "| `python -m launch.report run=RUN [watch=true]` | page |\n"
        "```json\npython -m launch.none\n```\n"
    )
    found = [Command("page.md", line) for line in documented._lines(page.read_text())]
    assert [(c.module, c.overrides) for c in found] == [
        ("launch.train", ["a=1", "b=x y"]),
        ("launch.report", ["run=RUN"]),
    ]


# --- all of them, run -----------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("command", OURS, ids=ids)
def test_the_command_runs(command, place, tmp_path):
    overrides = [UNTIL.get(word, word) for word in overrides_of(command, place)]
    name = command.module.removeprefix("launch.")
    if command.module.startswith("bench."):
        pytest.skip("benches are run by `make bench` and `make gpu`")
    if any(word.startswith("tasks=") for word in overrides):
        pytest.importorskip("lm_eval", reason="requirements-tasks.txt is not installed")
    if name == "serve":
        pytest.skip("it does not end by itself; tests/end_to_end/test_commands.py runs it")

    # what it writes goes to the test's folder, what it changes is a copy
    overrides = [re.sub(r"^(output=)(?=[\w.]+$)", rf"\1{tmp_path}/", word) for word in overrides]
    if name == "train" and any(word.startswith("resume=") for word in overrides):
        shutil.copytree(place / "run", tmp_path / "run")
        overrides = [word.replace(str(place / "run"), str(tmp_path / "run")) for word in overrides]

    drafts = [word.partition("=")[2] for word in overrides if "draft_budget=" in word]
    adaptive = drafts or any("router.budget=" in word for word in overrides)
    if name in ("evaluate", "generate") and adaptive:
        train_on(1, *small(["router=threshold", "balance=none"], tmp_path))
        overrides = [word for word in overrides if not word.startswith("run=")]
        overrides.append(f"run={tmp_path / 'run'}")
    if drafts:
        saved = (f"router.budget=[{drafts[0]}]", "save_budgets=true")
        launch("evaluate", f"run={tmp_path / 'run'}", *saved)

    if any(word.startswith("objective.cache=") for word in overrides):
        of = ("objective=distil", f"objective.run={place / 'run'}")
        launch("teach", *without_run(small(list(of), tmp_path)), f"to={tmp_path / 'words'}")
        overrides = [w.replace(str(place / "words"), str(tmp_path / "words")) for w in overrides]

    if name == "train":
        overrides = small(overrides, tmp_path)
    elif name == "teach":
        kept = [word for word in overrides if not word.startswith("to=")]
        overrides = [*without_run(small(kept, tmp_path)), f"to={tmp_path / 'words'}"]
    elif name == "prepare":
        overrides = little(overrides, tmp_path)
    elif name == "generate":
        overrides = [word if word != "prompt=..." else "prompt=the" for word in overrides]
        overrides.append("max_new_tokens=4")
    elif name == "compare":
        if any(word.startswith("resume=") for word in overrides):
            pytest.skip("there is no comparison; tests/end_to_end/test_compare.py goes on with one")
        overrides.append("launch.dry_run=true")
    elif name == "benchmark":
        overrides = benchable(overrides, tmp_path)
    elif name == "export":
        overrides = exportable(overrides, place, tmp_path)
    elif name == "branch":
        overrides = branchable(tmp_path)
    elif name == "place" and not any("parallel_size" in word for word in overrides):
        overrides.append("expert_parallel_size=2")  # the page's run has several ranks
    done = launch(name, *overrides, check=False, env={"HOME": str(tmp_path), **os.environ})
    wanted = (0, 1) if name == "doctor" else (0,)  # 1: the machine lacks something
    assert done.returncode in wanted, done.stdout[-2000:] + done.stderr[-2000:]


def exportable(overrides: list[str], place: Path, folder: Path) -> list[str]:
    """The same export of a run that a published family can express, to a folder of the test."""
    run = folder / "run"
    settings = [*write_text(folder), "train.seq_len=32", "train.micro_batch_size=1"]
    steps = ["train.global_batch_size=4", "train.num_steps=1", "optim.warmup_steps=0"]
    adapters = ["lora.rank=2", "balance=none"] if "adapter=true" in overrides else []
    given = [*settings, *steps, *adapters]
    launch("train", f"init.path={place / 'model'}", *given, f"run_dir={run}")
    kept = [word for word in overrides if not word.startswith(("run=", "to="))]
    return [*kept, f"run={run}", f"to={folder / 'out'}"]


def benchable(overrides: list[str], folder: Path) -> list[str]:
    """The same benchmark of a run with saved budgets, of few tokens."""
    run = folder / "run"
    train_on(1, *small(["router=threshold", "balance=none"], folder))
    budgets = [word.partition("=")[2] for word in overrides if word.startswith("budgets=")]
    if budgets:
        launch("evaluate", f"run={run}", f"router.budget={budgets[0]}", "save_budgets=true")
    kept = [word for word in overrides if not word.startswith(("run=", "contexts=", "rows="))]
    return [*kept, f"run={run}", "contexts=[8]", "rows=[1,2]", "new_tokens=4", "max_rounds=6"]


def branchable(folder: Path) -> list[str]:
    """A branch of a run whose learning rate is constant."""
    run = folder / "run"
    launch("train", *small(["optim.decay_style=constant", "optim.warmup_steps=1"], folder))
    return [f"run={run}", f"to={folder / 'out'}", "decay_steps=2"]


WITH_ITS_MODEL = (
    *("attention=mla", "attention.kv_lora_rank", "attention.q", "attention.v_head_dim"),
    *("attention.interval", "attention.dense_layers", "router.budget=3e6"),
)
"""Settings that only make sense of the shape that they are written for; kept with it."""


OF_CONVERSATIONS = ("data.too_long=", "data.train_on=", "data.thinking=", "data.chat_template=")
OF_LENGTH = (
    "train.num_tokens=",
    "train.num_epochs=",
    "optim.warmup_steps=",
    "optim.warmup_fraction=",
)
"""What plain text and three steps have no use for; their plans are made daily."""


def small(overrides: list[str], folder: Path) -> list[str]:
    """The same command with little text, in one process, for three steps; of a tiny model, but
    where a setting is about the quickstart's own.
    """
    resumed = any(word.startswith("resume=") for word in overrides)
    begun = any(word.startswith(("init.path=", "init.run=")) for word in overrides)
    shaped = begun or any(word.startswith(WITH_ITS_MODEL) for word in overrides)
    mixed = any(word.startswith("data.sources=") for word in overrides)
    tiny = [word for word in TINY if not shaped or not word.startswith("model.")]
    shape = [] if resumed else [*tiny, *([] if mixed else write_text(folder))]
    # restarts and resumption of ranks are a supervisor's, which has one rank here
    supervised = any(word.startswith(("launch.max_restarts=", "launch=")) for word in overrides)
    keep = [
        word
        for word in overrides
        if not re.match(r"launch(\.(?!dry_run|max_restarts)\w+)?=", word)
        and not word.startswith(
            ("run_dir=", "train.seq_len", "train.global_batch_size", "train.micro_batch_size")
        )
        and not re.match(r"parallel(\.expert_parallel_size|\.placement)?=", word)
        and (mixed or not word.startswith(("data=", "data.sources")))
        and not word.startswith((*OF_CONVERSATIONS, *OF_LENGTH))
    ]
    # a preset's router chooses from its own number of experts
    experts = "model.num_experts=8" if not resumed and not shaped else None
    preset = any(word.startswith("experiment=") for word in keep)
    return [
        *shape,
        *([experts] if experts else []),
        *keep,
        *(["parallel.expert_parallel_size=1"] if preset else []),
        *(["launch=deepspeed", "launch.num_devices=1"] if supervised else []),
        f"train.num_steps={7 if resumed else 3}",
        *([] if resumed else [f"run_dir={folder / 'run'}"]),
    ]


def without_run(overrides: list[str]) -> list[str]:
    """Without the directory of a run, which launch.teach does not make."""
    return [word for word in overrides if not word.startswith("run_dir=")]


def little(overrides: list[str], folder: Path) -> list[str]:
    """The same preparation of a small vocabulary, into a folder of the test."""
    return [*overrides, "model.vocab_size=300", f"data.cache_dir={folder / 'cache'}"]
