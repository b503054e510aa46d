"""Who went where: python -m launch.audit run=DIR [layer= step= expert= reason= token= limit=20] [compare=DIR2]."""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.audit")

import signal
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from launch.common import load_run, print_result, record, run_main
from train.strict_json import dumps

if TYPE_CHECKING:
    from train.audit import AuditLogConfig, AuditRecords, AuditSteps

BUSIEST = 3
"""Experts per layer whose tokens are shown."""
TOP_TOKENS = 5
MAX_SEQUENCES = 20_000
"""Most training sequences read for the tokens of experts, spread evenly over the sampled ones."""
MIN_ASSIGNMENTS = 10
"""An expert with fewer sampled assignments is nobody's favourite."""
CONTEXT = 6
"""Tokens shown on either side."""


def main(config: DictConfig) -> None:
    """Print a summary of a run's routing and single records of it; with compare, where two runs part."""
    from train.audit import FOLDER, AuditLogConfig, read_records, read_steps
    from train.checkpoint_folder import newest_complete

    if config.run is None:
        raise ValueError("give run=DIR")
    settings: AuditLogConfig = record(config, AuditLogConfig)
    run = load_run(settings.run, checkpoint=newest_complete(Path(settings.run)))
    folder = Path(settings.run) / FOLDER
    steps = read_steps(folder)
    if settings.layer is not None and settings.layer not in steps.moe_layers:
        raise ValueError(f"layer {settings.layer} has no experts; choose one of {', '.join(map(str, steps.moe_layers))}")
    if settings.expert is not None and settings.expert >= run.model.num_experts:
        raise ValueError(f"expert is {settings.expert}; the run has experts 0 to {run.model.num_experts - 1}")
    result: dict[str, Any] = {"run_dir": settings.run}
    if settings.compare is not None:
        result["compare"] = compare(steps, read_steps(Path(settings.compare) / FOLDER), settings)
    records = read_records(folder, settings.step)
    if settings.layer is not None:
        records = records.take(records.layer == settings.layer)
    texts = open_texts(settings.run, run)
    result |= summary(settings, steps, records)
    layers = steps.moe_layers if settings.layer is None else (settings.layer,)
    sample = records.take(records.sampled)
    vocabulary_ids = np.full(len(sample), -1) if texts is None else texts.vocabulary_ids(sample.token)
    result["layers"] = [layer_summary(layer, sample, vocabulary_ids, texts, run.model.num_experts) for layer in layers]
    if texts is not None:
        result["sources"] = source_summary(layers, sample, texts, run.model.num_experts)
    matching = records.take(_matching(records, settings))
    result["matching"] = len(matching)
    shown = matching.take(np.arange(min(settings.limit, len(matching))))
    print(f"\n{len(matching):,} matching records" + (f", the first {len(shown)}:" if len(shown) < len(matching) else ":"))
    for row in range(len(shown)):
        print_record(shown.take(np.array([row])), texts)
    print_result(result)


def _matching(records: AuditRecords, settings: AuditLogConfig) -> np.ndarray:
    """[N] bool: the records that the filters leave."""
    from ops.router import Reason

    mask = np.full(len(records), True)
    if settings.expert is not None:
        mask = np.bincount(records.owner[records.experts == settings.expert], minlength=len(records)) > 0
    if settings.reason is not None:
        mask &= records.reasons & int(Reason[settings.reason.upper()]) > 0
    return mask if settings.token is None else mask & (records.token == settings.token)


# --- the text behind token ids ---------------------------------------------------------------------------------------

class Texts:
    """Source and text of training tokens, from the run's token store. Token id = sample * seq_len + position."""

    def __init__(self, store: Any, run: Any):
        from train.data.store import TrainingSamples
        from train.data.tokenizer import TextInside

        self.seq_len = run.train.seq_len
        self.samples = TrainingSamples(store, tuple(s.weight for s in run.data.sources), self.seq_len, run.seed)
        self.text = TextInside(store.tokenizer())
        self.names = [source["path"] for source in store.manifest["sources"]]
        self.row = lru_cache(maxsize=1024)(self._row)

    def _row(self, sample: int) -> np.ndarray:
        self.samples.open(sample, sample + 1)
        return self.samples.tokens(sample)[:self.seq_len]

    def source(self, token: int) -> int:
        return self.samples.source_of(token // self.seq_len)

    def vocabulary_ids(self, tokens: np.ndarray) -> np.ndarray:
        """[N] token ids -> [N] int64, what stands there; -1 in sequences that were not read (see MAX_SEQUENCES)."""
        found = np.full(len(tokens), -1)
        samples, which = np.unique(tokens // self.seq_len, return_inverse=True)
        by_sample = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        for i in np.unique(np.linspace(0, len(samples) - 1, min(len(samples), MAX_SEQUENCES)).astype(int)):
            found[by_sample[i]] = self.row(int(samples[i]))[tokens[by_sample[i]] % self.seq_len]
        return found

    def decode(self, ids: np.ndarray) -> str:
        return self.text.decode(ids.tolist())

    def context(self, token: int) -> str:
        """The token in marks between its neighbours, on one line."""
        row, at = self.row(token // self.seq_len), token % self.seq_len
        before, after = row[max(0, at - CONTEXT):at], row[at + 1:at + 1 + CONTEXT]
        return _one_line(f"{self.decode(before)}⟦{self.decode(row[at:at + 1])}⟧{self.decode(after)}")


def open_texts(run_dir: str, run: Any) -> Texts | None:
    """None, with one line that says why, when the tokens the run was trained on cannot be had."""
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    try:
        recorded = TokenStore(Path(run_dir) / "data").manifest
        path = Path(run.data.cache_dir) / recorded["fingerprint"]  # even if the files it was made of are gone
        store = TokenStore(path if (path / "manifest.json").is_file() else prepare(run.data))
        if store.manifest["content"] != recorded["content"]:
            raise ValueError(f"{store.path} holds other tokens than the run was trained on")
        return Texts(store, run)
    except (ValueError, OSError) as error:
        print(f"token ids without text: {str(error).splitlines()[0]}")
        return None


def _one_line(text: str) -> str:
    return dumps(text, ensure_ascii=False)


# --- the summary -----------------------------------------------------------------------------------------------------

def summary(settings: AuditLogConfig, steps: AuditSteps, records: AuditRecords) -> dict[str, Any]:
    """What the log covers."""
    covered = np.unique(records.step)
    span = f"steps {covered[0]} to {covered[-1]}" if len(covered) else "no step"
    rates = np.unique(steps.sample_one_in).tolist()
    num_sampled = int(records.sampled.sum())
    print(f"{settings.run}: {span}, {len(records):,} records; {num_sampled:,} of them sampled (one token in "
          f"{' or '.join(map(str, rates)) or '?'}), the others have a reason")
    if steps.flagged_dropped or steps.lost_micro_batches:
        print(f"left out: {steps.flagged_dropped:,} tokens with a reason beyond audit.max_flagged, "
              f"{steps.lost_micro_batches:,} micro-batches the disk was too slow for")
    print("shares and means below are over the sampled tokens")
    return {"records": len(records), "sampled": num_sampled, "steps": len(covered), "sample_one_in": rates,
            "flagged_dropped": steps.flagged_dropped, "lost_micro_batches": steps.lost_micro_batches}


def layer_summary(layer: int, sample: AuditRecords, vocabulary_ids: np.ndarray, texts: Texts | None,
                  num_experts: int) -> dict[str, Any]:
    """Means of a layer, its reasons, and what its busiest experts see most often."""
    from ops.router import Reason

    chosen = sample.layer == layer
    vocabulary_ids, part = vocabulary_ids[chosen], sample.take(chosen)
    if len(part) == 0:
        print(f"layer {layer:3d}  nothing sampled")
        return {"layer": layer, "sampled": 0}
    reasons = {str(r.name).lower(): share for r in Reason if (share := float((part.reasons & r > 0).mean()))}
    facts = {"layer": layer, "sampled": len(part), "mean_k": float(part.k.mean()), "mean_margin": float(part.margin.mean()),
             "mean_entropy": float(part.entropy.mean()), "reasons": reasons}
    print(f"layer {layer:3d}  {len(part):,} sampled  k {facts['mean_k']:.3f}  margin {facts['mean_margin']:.4f}  entropy "
          f"{facts['mean_entropy']:.3f}  " + ("  ".join(f"{n} {s:.1%}" for n, s in reasons.items()) or "no reasons"))
    counts = np.bincount(part.experts, minlength=num_experts)
    busiest = []
    for expert in np.argsort(-counts, kind="stable")[:BUSIEST].tolist():
        seen = vocabulary_ids[part.owner[part.experts == expert]]
        values, times = np.unique(seen[seen >= 0], return_counts=True)
        top = np.argsort(-times, kind="stable")[:TOP_TOKENS]
        tokens = [] if texts is None else [(texts.decode(values[i:i + 1]), int(times[i])) for i in top]
        share = counts[expert] / max(1, counts.sum())
        busiest.append({"expert": expert, "share": float(share), "tokens": tokens})
        print(f"    expert {expert:3d} {share:6.1%}  " + "  ".join(f"{_one_line(text)} {n}" for text, n in tokens))
    return {**facts, "experts": busiest}


def source_summary(layers: tuple[int, ...], sample: AuditRecords, texts: Texts, num_experts: int) -> list[dict[str, Any]]:
    """Per data source the experts per token, and in each layer the expert whose share among the source's assignments most
    exceeds (lift) its share among all."""
    tokens, where = np.unique(sample.token, return_inverse=True)
    source_of = np.array([texts.source(int(token)) for token in tokens], dtype=np.int64)[where]
    found = []
    for source, name in enumerate(texts.names):
        own = source_of == source
        mean_k = float(sample.k[own].mean()) if own.any() else None
        favourites = []
        for layer in layers if len(texts.names) > 1 and own.any() else ():
            everyone = np.bincount(sample.take(sample.layer == layer).experts, minlength=num_experts)
            ours = np.bincount(sample.take(own & (sample.layer == layer)).experts, minlength=num_experts)
            lift = ours / max(1, ours.sum()) / np.maximum(everyone, 1) * everyone.sum()
            lift[everyone < MIN_ASSIGNMENTS] = 0
            if lift.max() > 0:
                favourites.append({"layer": layer, "expert": int(lift.argmax()), "lift": float(lift.max())})
        found.append({"source": source, "path": name, "mean_k": mean_k, "experts": favourites})
        print(f"source {source} {name}: " + ("nothing sampled" if mean_k is None else f"k {mean_k:.3f}  ")
              + "  ".join(f"layer {f['layer']}: expert {f['expert']} {f['lift']:.2f}x" for f in favourites))
    return found


def print_record(one: AuditRecords, texts: Texts | None) -> None:
    """One record; its text, if there is one, on a second line."""
    from train.audit import reason_names

    token = int(one.token[0])
    source = "" if texts is None else f"  source {(at := texts.source(token))} {texts.names[at]}"
    gates = " ".join(f"{expert}:{gate:.3f}" for expert, gate in zip(one.experts, one.gates, strict=True))
    print(f"step {one.step[0]}  layer {one.layer[0]}  token {token}{source}  k {one.k[0]}  reasons "
          f"{','.join(reason_names(int(one.reasons[0]))) or 'none'}  margin {one.margin[0]:.4f}  entropy "
          f"{one.entropy[0]:.3f}  experts {gates or 'none'}")
    if texts is not None:
        print(f"    {texts.context(token)}")


# --- two runs --------------------------------------------------------------------------------------------------------

def compare(ours: AuditSteps, theirs: AuditSteps, settings: AuditLogConfig) -> dict[str, Any]:
    """The first step and layer in which two runs sent some token to another expert.

    Raises:
        ValueError: they have experts in other layers, or no step in common.
    """
    if ours.moe_layers != theirs.moe_layers:
        raise ValueError(f"{settings.run} has experts in layers {list(ours.moe_layers)}, {settings.compare} in "
                         f"{list(theirs.moe_layers)}: nothing to compare")
    sums, other = ({int(s): c for s, c in zip(side.step, side.checksums, strict=True) if c is not None}
                   for side in (ours, theirs))
    common = sorted(sums.keys() & other.keys())
    if not common:
        raise ValueError(f"{settings.run} and {settings.compare} have no step with checksums in common")
    for step in common:
        for layer, one, two in zip(ours.moe_layers, sums[step], other[step], strict=True):
            if one != two:
                print(f"routing differs from {settings.compare} first in step {step}, layer {layer}: {one} against {two}; "
                      f"common steps before it, all agreeing: {common.index(step)}")
                return {"common_steps": len(common), "step": step, "layer": layer}
    print(f"routing agrees with {settings.compare} in all {len(common)} common steps ({common[0]} to {common[-1]}) and "
          f"{len(ours.moe_layers)} layers")
    return {"common_steps": len(common), "step": None, "layer": None}


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output is long: `| head` ends it in silence
    run_main("audit", main)
