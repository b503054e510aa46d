"""A logged step as one line of text."""

from __future__ import annotations

from typing import Any


def console_line(step: int, num_steps: int, scalars: dict[str, Any], eta_seconds: float) -> str:
    """One greppable line: name value pairs, two spaces apart."""
    parts = [
        f"step {step}/{num_steps}",
        f"loss {scalars['train/loss']:.4f}",
        f"lr {scalars['train/lr']:.2e}",
        f"gnorm {scalars['train/grad_norm']:.3f}",
    ]
    if "train/mtp_loss" in scalars:
        parts.insert(2, f"mtp {scalars['train/mtp_loss']:.4f}")
    if scalars["train/skipped_steps"]:
        parts.append(f"skipped {scalars['train/skipped_steps']}")
    if "moe/max_load" in scalars:
        parts += [
            f"balance {scalars['moe/max_load']:.2f}x (layer {scalars['moe/max_load_layer']})",
            f"dropped {scalars['moe/dropped']:.1%}",
        ]
        if "moe/budget_error" in scalars:
            parts.append(f"k {scalars['moe/experts_per_token']:.2f}")
        if scalars["moe/spilled"] > 1e-3:
            parts.append(f"spilled {scalars['moe/spilled']:.1%}")
        parts += [
            f"{name.removeprefix('moe/fallback/')} {share:.1%}"
            for name, share in scalars.items()
            if name.startswith("moe/fallback/")
            and share > 1e-3
            and not name.endswith(("overridden", "raised", "overflow"))
        ]
        if scalars["moe/layers_in_fallback"]:
            parts.append(f"plain top-k in {scalars['moe/layers_in_fallback']} layers")
    if "attention/tail_mass" in scalars:
        parts.append(f"tail {scalars['attention/tail_mass']:.1%}")
    if "attention/error_bound" in scalars:
        parts.append(f"attention error {scalars['attention/error']:.1%}")
    parts.append(f"{_human(scalars['perf/tokens_per_second'])} tok/s")
    if "perf/mfu" in scalars:
        parts.append(f"mfu {scalars['perf/mfu']:.1%}")
    if "comm/exposed_fraction" in scalars:
        parts.append(f"waiting {scalars['comm/exposed_fraction']:.1%}")
    parts += [f"mem {scalars['perf/memory_gib']:.2f}GiB", f"eta {_duration(eta_seconds)}"]
    return "  ".join(parts)


def _human(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
