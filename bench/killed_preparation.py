"""A preparation that is killed at random moments and started again, against an undisturbed one.

`python -m bench.killed_preparation [--megabytes 100] [--kills 3] [--workers 2] [--seed 0] [--words]
[--folder DIR] [--json FILE]`. A corpus is generated (bench/prepare_data.py), prepared once in
peace, and once more with SIGKILL to every process of the command at random shares of the time that
took. The two stores must have the same files byte for byte, and no shard that was on disk may be
made again. Exit code 1 where they do not. The folder needs room for four times the corpus. Without
--words a BPE is trained first, in which kills may fall as well; with it the words of the corpus are
the tokens, which takes a fifth of the time, and all kills fall into shards and the store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.common import find_commit
from bench.prepare_data import write_corpus
from train.files.strict_json import dumps

ROOT = Path(__file__).resolve().parent.parent
KEPT = re.compile(r"([\d,]+) shards of an earlier preparation were kept")


def write_words(corpus: Path, path: Path) -> int:
    """A tokenizer.json whose tokens are the words of the first file of the corpus; how many there
    are. What it does not know, numbers above all, is one unknown token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    found: set[str] = set()
    with min(corpus.iterdir()).open() as file:
        for line in file:
            found.update(json.loads(line)["text"].split())
    names = ["<unknown>", "<|endoftext|>", *sorted(found)]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names[:2])
    tokenizer.save(str(path))
    return len(names)


def started(corpus: Path, cache: Path, workers: int, tokenizer: list[str]) -> subprocess.Popen[str]:
    """launch.prepare in a session of its own."""
    command = [
        *(sys.executable, "-m", "launch.prepare", "data=files", "data.sources.0.path=json"),
        f"data.sources.0.data_files={corpus}",
        f"data.cache_dir={cache}",
        f"prepare.workers={workers}",
        *tokenizer,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What a preparation said to its end.

    Raises:
        RuntimeError: it did not succeed.
    """
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"launch.prepare ended with {process.returncode}: {said[-2000:]}")
    return said


def killed_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill every process of the session then; False: it had ended by itself."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def shards(cache: Path) -> int:
    return sum(1 for _ in cache.glob(".*.parts/*/*/*.npz"))


def content(cache: Path) -> dict[str, str]:
    """Hashes of all that is there, shards and locks included; of the index caches nothing."""
    found = {}
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(cache))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both preparations; the stores are left where they are."""
    corpus, rng = folder / "corpus", random.Random(arguments.seed)
    corpus.mkdir()
    write_corpus(corpus, arguments.megabytes)
    tokenizer = [
        f"model.vocab_size={arguments.vocabulary}",
        "data.tokenizer.max_documents=2000",
    ]
    if arguments.words:
        path = folder / "tokenizer.json"
        size = write_words(corpus, path)
        tokenizer = [f"model.vocab_size={size}", f"data.tokenizer.path={path}"]
    settings = (arguments.workers, tokenizer)

    begun = time.perf_counter()
    finished(started(corpus, folder / "undisturbed", *settings))
    seconds = time.perf_counter() - begun
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    # Of the time that all the work takes, whatever was done before.
    moments = sorted(rng.uniform(0.02, 0.98) for _ in range(arguments.kills))
    kills, before, again = [], 0.0, time.perf_counter()
    for moment in moments:
        process = started(corpus, folder / "killed", *settings)
        was_killed = killed_after(process, (moment - before) * seconds)
        found = shards(folder / "killed")
        kills.append({"share": round(moment, 3), "killed": was_killed, "shards_on_disk": found})
        print(f"kill at {moment:.0%}: {kills[-1]}", flush=True)
        before = moment
    said = finished(started(corpus, folder / "killed", *settings))
    kept = KEPT.search(said)
    hashes = [content(folder / name) for name in ("undisturbed", "killed")]
    return {
        "bench": "killed_preparation",
        "commit": find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "megabytes_of_text": arguments.megabytes,
        "tokenizer": "words" if arguments.words else "bpe",
        "workers": arguments.workers,
        "load_average": round(os.getloadavg()[0], 1),
        "seed": arguments.seed,
        "kills": kills,
        "shards_kept_by_the_last": int(kept[1].replace(",", "")) if kept else 0,
        "seconds_undisturbed": round(seconds, 1),
        "seconds_killed": round(time.perf_counter() - again, 1),
        "files": len(hashes[0]),
        "bytes": sum(p.stat().st_size for p in (folder / "undisturbed").rglob("*") if p.is_file()),
        "equal": hashes[0] == hashes[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.killed_preparation")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--words", action="store_true", help="words are the tokens: no BPE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the corpus and the stores are made")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        result = measured(arguments, Path(name))
    if arguments.json:
        arguments.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result), flush=True)
    on_disk = result["kills"][-1]["shards_on_disk"] if result["kills"] else 0
    if not result["equal"] or result["shards_kept_by_the_last"] != on_disk:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
