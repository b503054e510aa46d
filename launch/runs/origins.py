"""Which tokens an expert gets: words and sources, from the routing audit."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from launch.config.overrides import typed
from launch.runs.records import Origins
from train.config.run import RunConfig

MAX_AUDIT_BYTES = 1 << 26
"""Of larger audits only AUDIT_STEPS steps are read, spread evenly."""
AUDIT_STEPS = 8
MAX_EXPERTS = 32
"""Experts per layer whose tokens are listed, the busiest ones."""
TOP_TOKENS = 6
MIN_TIMES = 2
"""A token seen less often at an expert is not typical of it."""


def read_origins(directory: str, config: RunConfig, missing: list[str]) -> Origins | None:
    """Read the tokens and sources of experts from the sampled records of the routing audit. None,
    with a reason in `missing`, where there are none.
    """
    from launch.runs.texts import open_texts
    from train.audit.files import steps_that_fit
    from train.audit.format import FOLDER
    from train.audit.records import read_records, read_steps

    # Only tokens chosen by hash are a fair sample: flagged ones are there because they are odd.
    folder = Path(directory) / FOLDER
    try:
        chosen = steps_that_fit(folder, MAX_AUDIT_BYTES, AUDIT_STEPS, read_steps(folder).step)
        part = read_records(folder, chosen)
        part = part.take(part.sampled)
    except (ValueError, OSError, KeyError) as error:
        missing.append(f"tokens of experts: {str(error).splitlines()[0]}")
        return None
    if not len(part):
        missing.append("tokens of experts: the audit has sampled no token yet")
        return None

    # Without the store there is no text, but loads of experts are still worth showing.
    said = io.StringIO()
    texts = None
    if _tokens_at_hand(directory, config):
        with contextlib.redirect_stdout(said):
            texts = open_texts(directory, config)
    if texts is None:
        reason = said.getvalue().strip().removeprefix("token ids without text: ")
        if not reason:
            reason = (
                "the run's tokens are no longer in data.cache_dir; `python -m "
                f"launch.audit {typed('run', directory)}` prepares them again"
            )
        missing.append(f"text of tokens: {reason}")

    layer = part.layer[part.owner]
    expert = part.experts
    token = part.token[part.owner]

    # Tokens are looked up once, although each stands at several experts and layers.
    distinct, where = np.unique(token, return_inverse=True)
    vocabulary = np.full(len(token), -1)
    source = np.zeros(len(token), np.int64)
    if texts is not None:
        vocabulary = texts.vocabulary_ids(distinct)[where]
        source = np.array([texts.source(int(t)) for t in distinct], np.int64)[where]

    names = [] if texts is None else [str(name) for name in texts.names]
    layers = [
        _layer_origins(
            expert[layer == at],
            vocabulary[layer == at],
            source[layer == at],
            texts,
            config.model.num_experts,
            len(names),
        )
        for at in config.model.moe_layers
    ]

    note = f"{len(distinct):,} sampled tokens"
    if chosen is not None:
        note += f" of {len(chosen)} steps, since the audit is large"
    if config.model.num_experts > MAX_EXPERTS:
        note += f"; the {MAX_EXPERTS} busiest experts of each layer"
    return Origins(names, layers, note)


def _tokens_at_hand(directory: str, config: RunConfig) -> bool:
    """Whether the tokens need not be prepared (downloaded, perhaps) first."""
    try:
        manifest = json.loads((Path(directory) / "data" / "manifest.json").read_text())
        folder: Path = Path(config.data.cache_dir) / manifest["fingerprint"]
        return (folder / "manifest.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _layer_origins(
    expert: np.ndarray,
    vocabulary: np.ndarray,
    source: np.ndarray,
    texts: Any,
    num_experts: int,
    num_sources: int,
) -> list[dict[str, Any]]:
    """One layer's assignments [A]: its busiest experts, each with its tokens and the shares of
    sources.
    """
    counts = np.bincount(expert, minlength=num_experts)
    order = np.argsort(expert, kind="stable")
    ends = np.cumsum(counts)
    everyone = np.bincount(vocabulary[vocabulary >= 0], minlength=1)
    found = []

    for number in np.argsort(-counts, kind="stable")[:MAX_EXPERTS].tolist():
        rows = order[ends[number] - counts[number] : ends[number]]

        # Lift: how much more often the expert sees a token than the layer as a whole.
        seen = vocabulary[rows]
        ids, times = np.unique(seen[seen >= 0], return_counts=True)
        lift = times / max(1, times.sum()) / np.maximum(everyone[ids], 1) * max(1, everyone.sum())

        # Typical weighs lift by how often it was seen, or single tokens would lead the list.
        frequent = np.argsort(-times, kind="stable")[:TOP_TOKENS]
        often = np.flatnonzero(times >= MIN_TIMES)
        typical = often[
            np.argsort(-(times * np.log(np.maximum(lift, 1e-9)))[often], kind="stable")
        ][:TOP_TOKENS]

        shown: dict[str, list[Any]] = {"frequent": [], "typical": []}
        if texts is not None:
            for name, chosen in (("frequent", frequent), ("typical", typical[lift[typical] > 1])):
                shown[name] = [
                    [texts.decode(ids[i : i + 1]), int(times[i]), round(float(lift[i]), 2)]
                    for i in chosen
                ]

        shares = (
            np.bincount(source[rows], minlength=num_sources) / max(1, len(rows))
            if num_sources
            else np.zeros(0)
        )
        found.append(
            {
                "expert": number,
                "assignments": int(counts[number]),
                "share": float(counts[number] / max(1, len(expert))),
                **shown,
                "sources": [round(float(s), 4) for s in shares],
            }
        )
    return found
