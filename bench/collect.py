"""Merge what bench/gpu.sh left in a folder into bench/results/<date>-<device>.json.

`python -m bench.collect FOLDER PYTEST_STATUS` prints the path it wrote.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.common import ROOT, device_name, find_commit
from train.files.strict_json import dumps


def main(folder: Path, pytest_status: int, when: datetime, device: torch.device) -> Path:
    """FOLDER holds <bench>.json of the benches that finished and pytest.log."""
    benches = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    log = (folder / "pytest.log").read_text().split("\n")
    summary = next((line.strip("= ") for line in reversed(log) if " in " in line), "no summary")
    result = {
        "device": device_name(device),
        "commit": find_commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": when.isoformat(timespec="seconds"),
        "pytest": {
            "status": pytest_status,
            "summary": summary,
            "failed": [line for line in log if line.startswith(("FAILED", "ERROR"))],
        },
        "rows": [{"bench": bench["bench"], **row} for bench in benches for row in bench["rows"]],
    }
    slug = "-".join(device_name(device).lower().split())
    path = ROOT / "bench" / "results" / f"{when:%Y%m%d-%H%M%S}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(dumps(result, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), datetime.now(UTC), torch.device("cuda")))
