"""Whatever a config holds: parsing gives a RunConfig or an error whose every line names a key; nothing is executed."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.common import plain
from launch.validate import ConfigError, parse
from train.config import RunConfig

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")
CONFIGS = (
    (1, ()),
    (1, ("experiment=quickstart_sparse",)),
    (1, ("router=top_p", "balance=none", "attention=nsa")),
    (8, ("experiment=olmoe_1b_7b", "launch=deepspeed", "launch.num_devices=8", "parallel=ep8", "router=threshold",
         "balance=none", "deepspeed=zero3", "train.global_batch_size=64")),
)
EXECUTING = ("os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "torch.load", "runpy.run_path")
NOT_COMPONENTS = (
    "model.transformer.Transformer", "model.something_that_is_not_a_class", "model.config.ModelConfig", "model.moe.MoELayer",
    "model.attention.base.KVCache", "model.attention.base.Attention", "model.routers.base.Router", "model.dispatch._Plan",
    "model.dispatch.Protocol", "model.routers.top_k.RouteSpec", "model.transformer.torch.nn.Linear", "model.config.Any",
    "model.dispatch.AllToAllDispatcher", "model.attention.dense.DenseAttention", "model.routers.top_k.TopKRouter", "model",
    "model.", "model..os", "model.x\0y.Z", "model." + "a." * 500 + "b", "model.\ud800.x", "models.evil.Evil", "")
VALUES = (None, True, False, 0, -1, 1, 2**31,
          10**40, -(10**40), 10**400, 0.0, -0.5, 1e-30, 1e300, math.nan, math.inf, -math.inf,
          "", " ",
          "???", "${oc.env:HOME}", "zürich 東京 🙂", "\ud800", "a\nb", "\0", "\u2028", "x" * 100_000, "1",
          "nan", "-1", "true", [],
          [1, "a", None], {}, {"_target_": "os.system", "command": "true"}, {"deep": {"er": [1]}}, [[[]]], {"0": 1}, {1: 2},
          [{}], 1 + 2j, b"bytes", *EXECUTING, *NOT_COMPONENTS)
KEYS = ("unknown", "num_step", "", "a.b", "a\nb", "\ud800", "x" * 10_000, "_target_", "_args_", "_partial_", 1, None, (1, 2),
        1.5)


@pytest.fixture(scope="module")
def configs() -> list[tuple[int, dict]]:
    with initialize_config_dir(CONF, version_base="1.3"):
        return [(size, plain(compose("train", overrides=list(overrides)))) for size, overrides in CONFIGS]




def places(node: dict | list, path: tuple = ()) -> list[tuple]:
    """Paths of all leaves and branches below a node."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def at(node, path: tuple):
    for key in path:
        node = node[key]
    return node


@st.composite
def mutations(draw) -> tuple[int, list[tuple]]:
    """Which config, and what is done to it: (kind, where it is as a share of all places, value or key)."""
    steps = st.tuples(st.sampled_from(("set", "set", "set", "remove", "add")), st.floats(0, 1, exclude_max=True),
                      st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20), st.sampled_from(KEYS))
    return draw(st.integers(0, len(CONFIGS) - 1)), draw(st.lists(steps, min_size=1, max_size=3))


def mutate(config: dict, steps: list[tuple]) -> tuple[dict, list[tuple]]:
    """A changed copy, and the paths that were changed."""
    config, changed = copy.deepcopy(config), []
    for kind, share, value, key in steps:
        found = places(config)
        path = found[int(share * len(found))]
        parent = at(config, path[:-1])
        if kind == "add" and isinstance(parent, dict):
            parent[key] = copy.deepcopy(value)
            changed.append((*path[:-1], key))
        elif kind == "remove":
            del parent[path[-1]]
            changed.append(path)
        else:
            parent[path[-1]] = copy.deepcopy(value)
            changed.append(path)
    return config, changed


SECTIONS = "|".join(sorted(f.name for f in dataclasses.fields(RunConfig)))


def check(config: dict, world_size: int) -> ConfigError | None:
    try:
        assert isinstance(parse(config, world_size), RunConfig)
        return None
    except ConfigError as error:
        assert error.problems
        for line in error.problems:
            assert line.isprintable(), f"not one printable line: {line!r}"
            assert len(line) < 1000, f"{len(line)} characters: {line[:200]!r}"
            assert re.search(rf"\b({SECTIONS})\b", line) or line.startswith("unknown key "), f"names no key: {line!r}"
        return error


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(mutation=mutations())
def test_any_config_is_accepted_or_refused_with_lines_that_name_keys(configs, mutation):
    index, steps = mutation
    world_size, config = configs[index]
    config, changed = mutate(config, steps)
    check(config, world_size)
