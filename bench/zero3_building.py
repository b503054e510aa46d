"""What a rank holds at most while its model is built under ZeRO-3, over what it keeps: weights
shared out one by one as they are drawn, and all of them whole before the engine shares them out.

`python -m bench.zero3_building [--ranks 2,4] [--layers 4] [--json FILE]`. Ranks are processes on a
CPU, without expert parallelism, so that all of the model is shared out; measured as
bench.plan_memory does. `--read PLACE ...` reads the weights from a run or a published folder
instead, which `--settings` (beside those of MODEL) must describe.
Kept is what is there once the engine is made: weights, masters in fp32, sums of gradients, but no
moments, which the first step makes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from pathlib import Path
from typing import Any

from bench.common import find_commit
from bench.plan_memory import (
    MODEL,
    SMALL,
    begun,
    build,
    finish,
    import_all,
    resident,
    settings_of,
    start,
)
from train.files.sizes import MIB
from train.files.strict_json import dumps
from train.pretrained.start import starting_weights
from train.rank.runtime import process_group


def built(overrides: tuple[str, ...], at_once: bool) -> dict[str, int]:
    """Bytes above the beginning: at the peak of drawing, of reading, of the engine, and kept."""
    run, _ = settings_of(overrides)
    drawn = tuple(word for word in overrides if not word.startswith("init."))
    with process_group(600), tempfile.TemporaryDirectory() as folder:
        groups = begun(run)
        build(settings_of((*drawn, *SMALL))[0], groups, at_once, 0)[0].close()
        gc.collect()
        base = resident("VmRSS")
        engine, found = build(run, groups, at_once, base, starting_weights(run, Path(folder)))
        engine.close()
    return found


def beginning(place: Path) -> str:
    """The setting that a run begins from the weights there by."""
    return f"init.{'path' if (place / 'config.json').exists() else 'run'}={place}"


def peak_of(found: dict[str, int]) -> int:
    return max(size for phase, size in found.items() if phase.endswith("_peak"))


def at_once(overrides: tuple[str, ...]) -> dict[str, int]:
    return built(overrides, True)


def whole_first(overrides: tuple[str, ...]) -> dict[str, int]:
    return built(overrides, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--size", choices=("usual", "small"), default="usual")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--read", type=Path, nargs="*", default=[None])
    parser.add_argument("--settings", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import_all()
    rows: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for ranks in map(int, options.ranks.split(",")):
        model = (*MODEL, f"model.num_layers={options.layers}", *options.settings)
        for place, precision, work in itertools.product(
            options.read, ("fp32", "bf16"), (whole_first, at_once)
        ):
            overrides = (
                *model,
                *(SMALL if options.size == "small" else ()),
                *("deepspeed=zero3", "launch=deepspeed", f"launch.num_devices={ranks}"),
                *(() if place is None else (beginning(place),)),
                f"train.precision={precision}",
            )
            by_rank = finish(start(work, overrides, ranks))
            row = max(by_rank, key=peak_of)
            peak = peak_of(row)
            read = "" if place is None else f", {beginning(place).partition('=')[0]}"
            name = f"{ranks} ranks, {precision}{read}, {work.__name__}"
            rows[name] = {**row, "peak_over_kept": round(peak / row["engine"], 3)}
            said = {key: f"{value / MIB:.1f}" for key, value in row.items()}
            print(f"{name:32s} {said} peak / kept {peak / row['engine']:.3f}", flush=True)
            result = {"bench": "zero3_building", "commit": find_commit(), "device": "cpu"}
            result |= {"settings": model, "rows": rows}
            if options.json is not None:
                options.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
