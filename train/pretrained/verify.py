"""Whether an exported folder computes what the run computes: logits of real text, by transformers
from the folder and by us from the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.reader import MergedReader
from train.checkpoint.writer import load_weights
from train.components import build_model
from train.config.lora import LoraConfig
from train.config.run import RunConfig
from train.data.store import TokenStore
from train.files.durable import write_text
from train.files.strict_json import dumps
from train.pretrained.compressed import MOST_MOVED
from train.pretrained.described import describe
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import PretrainedError, read_json, write_shards

TOLERANCE = 1e-3
"""Of the largest logit, between transformers and us with the very same rounded weights, in fp32."""
ADAPTER_ROUNDING = 0.02
"""Of what an adapter moves: several times the 8 bits of bf16 that its numbers are stored in."""
SHARD_BYTES = 5 * 10**9
"""Of a file of numbers that 8-bit floats stand for."""
LENGTH = 64
NUM_TEXTS = 4
TEXT = (
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the "
    "slings and arrows of outrageous fortune, or to take arms against a sea of troubles. "
)


@dataclass(frozen=True)
class Comparison:
    largest: float
    """Largest difference of a logit between transformers and us, both with the folder's weights."""
    agreement: float
    """Share of positions with the same most likely token, of the folder and of the checkpoint."""
    rounding: float
    """Largest difference of a logit that storing the weights in the folder's dtype makes."""
    moved: float
    """Root mean square of that difference."""
    deviation: float
    """Standard deviation of the checkpoint's logits."""

    @property
    def line(self) -> str:
        return (
            f"verified: logits of transformers differ by at most {self.largest:.2g} (standard "
            f"deviation {self.deviation:.2g}); rounding the weights moves a logit by at most "
            f"{self.rounding:.2g} ({self.moved:.2g} as root mean square), and "
            f"{self.agreement:.1%} of the most likely tokens stay"
        )

    @property
    def facts(self) -> dict[str, float]:
        return {
            "largest_difference": self.largest,
            "next_token_agreement": self.agreement,
            "rounding": self.rounding,
            "moved": self.moved,
        }


@dataclass(frozen=True)
class AdapterComparison:
    largest: float
    """Largest difference of a logit between peft and the checkpoint."""
    moved: float
    """Largest change of a logit that the adapter makes."""
    agreement: float
    """Share of positions with the same most likely token, of the folder and of the checkpoint."""

    @property
    def line(self) -> str:
        return (
            f"verified: the adapter moves logits by at most {self.moved:.2g}, and those of peft "
            f"differ from the run's by at most {self.largest:.2g}; {self.agreement:.1%} of the "
            "most likely tokens are the same"
        )

    @property
    def facts(self) -> dict[str, float]:
        return {
            "largest_difference": self.largest,
            "next_token_agreement": self.agreement,
            "moved": self.moved,
        }


@torch.no_grad()
def compare_adapter(
    run: RunConfig, checkpoint: Path, run_dir: Path, folder: Path
) -> AdapterComparison:
    """Load the folder with peft onto the published weights that the run began with, and hold it
    against the checkpoint. Everything in fp32 on the CPU.

    Raises:
        PretrainedError: transformers or peft is not installed, does not load the folder, or
            computes something else.
    """
    peft = _optional("peft", "peft")
    assert run.init.path is not None
    base = _theirs(Path(run.init.path).expanduser())
    tokens = _tokens(run, run_dir)
    before = torch.cat([base(input_ids=row[None]).logits for row in tokens])
    theirs = peft.PeftModel.from_pretrained(base, folder).float().eval()
    expected = torch.cat([theirs(input_ids=row[None]).logits for row in tokens])

    model = build_model(dataclasses.replace(run, lora=LoraConfig())).eval()
    load_weights(model, checkpoint)
    exact = torch.cat([model.logits(row[None]) for row in tokens])

    # What was rounded is the adapters alone, so a difference far below what they make is theirs.
    largest, moved = float((exact - expected).abs().max()), float((exact - before).abs().max())
    limit = TOLERANCE * max(1.0, float(exact.abs().max())) + ADAPTER_ROUNDING * moved
    if not largest <= limit:
        raise PretrainedError(
            f"peft computes other logits with the exported adapter: they differ by {largest:.3g}, "
            f"more than {limit:.2g}, and the adapter moves them by {moved:.2g}; nothing was "
            "written. Where init.path holds other weights than it did, put those back; else this "
            "is a fault of launch.export"
        )
    agreement = float((exact.argmax(-1) == expected.argmax(-1)).float().mean())
    return AdapterComparison(largest, moved, agreement)


@torch.no_grad()
def compare(
    run: RunConfig, checkpoint: Path | MergedReader, run_dir: Path, folder: Path
) -> Comparison:
    """Load the folder twice, with transformers and with our reader, and hold both against what was
    exported, a checkpoint or what else a reader reads. Everything in fp32 on the CPU.

    Raises:
        PretrainedError: transformers is not installed, does not load the folder, or computes
            something else.
    """
    tokens = _tokens(run, run_dir)
    theirs = _theirs(folder)
    _require_same_ids(run_dir, folder)
    expected = torch.cat([theirs(input_ids=row[None]).logits for row in tokens])

    # The very same numbers in our model: what differs now is the arithmetic.
    model = build_model(run).eval()
    PretrainedFolder(folder).fill_model(model)
    rounded = torch.cat([model.logits(row[None]) for row in tokens])
    load_weights(model, checkpoint)
    exact = torch.cat([model.logits(row[None]) for row in tokens])

    largest = float((rounded - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(exact.abs().max()))
    if not largest <= limit:
        raise PretrainedError(
            f"transformers computes other logits from the exported weights: they differ by "
            f"{largest:.3g}, more than {limit:.2g}; nothing was written. This is a fault of "
            "launch.export: please report it with the run's config.yaml"
        )
    moved, deviation = float((exact - rounded).square().mean().sqrt()), float(exact.std())
    is_fp8 = "quantization_config" in read_json(folder / "config.json")
    if is_fp8 and not moved <= MOST_MOVED * deviation:
        raise PretrainedError(
            f"8-bit weights move the logits by {moved:.2g} as root mean square, more than "
            f"{MOST_MOVED} of their standard deviation of {deviation:.2g}; nothing was written. "
            "Give dtype=bf16"
        )
    return Comparison(
        largest,
        float((exact.argmax(-1) == expected.argmax(-1)).float().mean()),
        float((exact - rounded).abs().max()),
        moved,
        deviation,
    )


def _tokens(run: RunConfig, run_dir: Path) -> torch.Tensor:
    """[NUM_TEXTS, S] int64: pieces of a text, in the run's tokens."""
    tokenizer = TokenStore(run_dir / "data").tokenizer()
    length = min(LENGTH, run.model.max_seq_len)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    needed = NUM_TEXTS * length
    return torch.tensor((ids * (1 + needed // len(ids)))[:needed]).view(NUM_TEXTS, length)


def _require_same_ids(run_dir: Path, folder: Path) -> None:
    """
    Raises:
        PretrainedError: the folder's tokenizer, as transformers loads it, makes other tokens of a
            text than the run did.
    """
    theirs = _transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = theirs(TEXT, add_special_tokens=False)["input_ids"]
    tokenizer = TokenStore(run_dir / "data").tokenizer()
    if found != tokenizer.encode(TEXT, add_special_tokens=False).ids:
        raise PretrainedError(
            "transformers makes other tokens of a text with the exported tokenizer than the run "
            "did; nothing was written. data.tokenizer.path of the run names the files it came from"
        )


@contextlib.contextmanager
def _dequantised(folder: Path) -> Iterator[Path]:
    """The folder with the fp32 numbers that its 8-bit floats stand for, beside it for a while."""
    described = describe(folder)
    shards = described.shards
    names = [
        name
        for name in shards.shapes
        if not (
            name.endswith(shards.fp8_scales)
            and name.removesuffix(shards.fp8_scales) in shards.shapes
        )
    ]
    shapes = {name: shards.shapes[name] for name in names}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        there = Path(scratch)
        dtypes = dict.fromkeys(names, torch.float32)
        write_shards(there, shapes, dtypes, SHARD_BYTES, shards.tensor)
        config = read_json(folder / "config.json")
        del config["quantization_config"]
        write_text(there / "config.json", dumps(config | {"dtype": "float32"}) + "\n")
        yield there


def _transformers() -> Any:
    return _optional("transformers", "'transformers>=5,<6'")


def _optional(name: str, requirement: str) -> Any:
    """
    Raises:
        PretrainedError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PretrainedError(
            f"verify=true needs {name}, which is not installed: pip install {requirement}, or "
            "verify=false"
        ) from None


def _theirs(folder: Path) -> Any:
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # With 8-bit floats it would want another library, and to compute with them: it gets the
    # numbers that they stand for, in a folder that is gone when they are read.
    with contextlib.ExitStack() as stack:
        if "quantization_config" in read_json(folder / "config.json"):
            folder = stack.enter_context(_dequantised(folder))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    # It knows layers that predict further tokens by their numbers in published models alone.
    further = getattr(model.config, "num_nextn_predict_layers", None) or 0
    last = model.config.num_hidden_layers
    left = tuple(f"model.layers.{number}." for number in range(last, last + further))
    wrong = [
        str(name) for kind in report for name in report[kind] if not str(name).startswith(left)
    ]
    if wrong:
        raise PretrainedError(f"transformers does not load the folder as it is: {wrong[0]}")
    return model.eval()
