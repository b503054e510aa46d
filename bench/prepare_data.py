"""Preparing a corpus against the tokenizers library alone, in one run on the same cores.

`python -m bench.prepare_data [--megabytes 100] [--workers 2] [--rounds 3] [--json FILE]`. Ours is
everything that `launch.prepare` does: reading JSON lines, tokenising, holding documents out,
writing shards and the store with its checksums. The rival is `encode_batch` with the library's own
threads, on texts that are in memory already, and its tokens are thrown away. Rounds alternate, so
that a busy machine hits both alike; processor time of all processes is counted beside the clock.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench.common import find_commit
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.loader import TrainingLoader
from train.data.prepare import prepare, train_bpe
from train.data.sources import documents
from train.data.store import TokenStore, TrainingSamples
from train.data.worker import apart
from train.files.strict_json import dumps

ROW = 65_536
"""Tokens of the rows whose loading is timed."""
BATCH = 1000
"""Documents of a call of encode_batch."""


def write_corpus(folder: Path, megabytes: int) -> None:
    """JSON lines of text whose words are as frequent as Zipf's law says; 50 MB a file."""
    rng = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = [
        "".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 10))) for _ in range(60_000)
    ]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    sentences = [
        " ".join(rng.choices(words, weights, k=rng.randint(10, 40))).capitalize() + "."
        for _ in range(40_000)
    ]
    written = number = 0
    while written < megabytes * 10**6:
        with (folder / f"{number:04d}.jsonl").open("w") as file:
            here = 0
            while here < 50 * 10**6 and written + here < megabytes * 10**6:
                text = " ".join(rng.choices(sentences, k=rng.randint(2, 40)))
                here += file.write(dumps({"text": f"{text} {rng.random()}"}) + "\n")
        written, number = written + here, number + 1


def spent(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of processors, children's included."""

    def processors() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))

    before, begun = processors(), time.perf_counter()
    action()
    return time.perf_counter() - begun, processors() - before


def loading(store: TokenStore, seq_len: int, rows: int = 50) -> float:
    """Median milliseconds in which a loader makes a micro-batch of one row, order and packing
    included, after the first of them.
    """
    samples = TrainingSamples(store, (1.0,), seq_len, 7)
    loader = TrainingLoader(samples, seq_len, 1, store.end_of_document, 0, 1)
    loader.next_step(1)
    times = []
    for _ in range(rows):
        begun = time.perf_counter()
        loader.next_step(1)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prepare_data")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, arguments.megabytes)
        source = SourceConfig("json", data_files=str(folder / "*.jsonl"))
        texts = list(documents(source))
        size = sum(len(text.encode()) for text in texts)
        file = str(folder / "tokenizer.json")
        settings = TokenizerConfig(file, vocab_size=arguments.vocabulary)
        # In a child: the library's threads would not survive the forks that come.
        apart(lambda: train_bpe(iter(texts[:2000]), settings).save(file))

        def rival() -> None:
            from tokenizers import Tokenizer

            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
            tokenizer = Tokenizer.from_file(file)
            for first in range(0, len(texts), BATCH):
                tokenizer.encode_batch(texts[first : first + BATCH], add_special_tokens=False)

        def ours() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                config = DataConfig((source,), settings, 0.01, cache)
                prepare(config, lambda line: None, arguments.workers)

        # Rows of other documents every time, so that each is read and verified for the first time.
        kept = DataConfig((source,), settings, 0.01, str(folder / "cache"))
        store = TokenStore(prepare(kept, lambda line: None, arguments.workers))
        row_ms = loading(store, ROW)

        rounds = []
        for number in range(arguments.rounds):
            pair = {"encode_batch": lambda: apart(rival), "ours": ours}
            order = list(pair) if number % 2 else list(pair)[::-1]
            rounds.append({kind: spent(pair[kind]) for kind in order})

    seconds = {
        kind: [statistics.median(one[kind][i] for one in rounds) for i in (0, 1)]
        for kind in ("ours", "encode_batch")
    }
    result = {
        "bench": "prepare_data",
        "commit": find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "megabytes_of_text": round(size / 1e6, 1),
        "workers": arguments.workers,
        "load_average": round(os.getloadavg()[0], 1),
        "row_tokens": ROW,
        "milliseconds_to_load_a_row": round(row_ms, 2),
        "rounds": [
            {kind: [round(x, 2) for x in value] for kind, value in one.items()} for one in rounds
        ],
        "ours_mb_per_second": round(size / 1e6 / seconds["ours"][0], 2),
        "encode_batch_mb_per_second": round(size / 1e6 / seconds["encode_batch"][0], 2),
        "ratio_of_throughput": round(seconds["encode_batch"][0] / seconds["ours"][0], 3),
        "ratio_of_processor_time": round(seconds["encode_batch"][1] / seconds["ours"][1], 3),
    }
    text = dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(dumps(result), flush=True)


if __name__ == "__main__":
    main()
