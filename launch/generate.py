"""Continue a prompt.

python -m launch.generate run=DIR prompt="..." [temperature= top_p= seed= max_new_tokens= router.budget=]
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.generate")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.common import load_run, print_result, record, run_main


def sample(run_dir: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
           checkpoint: str = "best", budget: float | None = None, attention: Any = None) -> Iterator[str]:
    """Yield the prompt and then the text as it is generated, piece by piece, from one process. Joined it is what all tokens
    decode to: a piece may be empty, while a character or a run of bytes is unfinished."""
    import torch

    from model.generate import generate
    from train.checkpoint import find_checkpoint, load_weights
    from train.components import build_model
    from train.data.store import TokenStore
    from train.data.tokenizer import TextStream

    folder = find_checkpoint(Path(run_dir), prefer=checkpoint)
    config = load_run(run_dir, attention, folder)
    store = TokenStore(Path(run_dir) / "data")
    tokenizer = store.tokenizer()
    model = build_model(config)
    load_weights(model, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    if budget is not None:
        from train.calibrate import calibrate_budget, calibration_batches
        from train.data.prepare import prepare

        batches = calibration_batches(config, TokenStore(prepare(config.data)))
        calibrate_budget(model, batches, budget, config.balance, config.budget, device)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    yield prompt
    text = TextStream(tokenizer, prompt_ids)
    for token in generate(model, prompt_ids, max_new_tokens, temperature, top_p, seed, store.end_of_document):
        yield text.add(token)
    yield text.end()


def main(config: DictConfig) -> None:
    from train.config import GenerateConfig

    if config.run is None or config.prompt is None:
        raise ValueError("give run=DIR and prompt='...'")
    config.prompt = str(config.prompt)  # Hydra reads prompt=5 as a number
    settings = record(config, GenerateConfig)
    pieces = []
    for piece in sample(settings.run, settings.prompt, settings.max_new_tokens, settings.temperature, settings.top_p,
                        settings.seed, settings.checkpoint, settings.router.budget, settings.attention):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    print_result({"run_dir": settings.run, "prompt": settings.prompt, "text": "".join(pieces[1:])})


if __name__ == "__main__":
    run_main("generate", main)
