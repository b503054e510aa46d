"""What rounding to 8-bit floats leaves of the experts' numbers: outputs and gradients under
experts.precision fp8 and fp8_all and in bf16, against fp32, by shape, by rows of an expert and by
what stands out among them.

`python -m bench.fp8_experts [--largest 4096] [--train FOLDER] [--json FILE]`. Random numbers, two
experts, two to a token, in torch's back-end, which rounds as the kernels do: nothing is timed.
Every error is the norm of the difference over the norm. `--largest` leaves out wider shapes. What
stands out: one in 128 columns of the tokens, one in 128 tokens, or the gradient of one in 128
tokens, so many times larger than the others.

A row that stands out fills the norm of a gradient as well, so what it does to the rows beside it is
told apart: the error of their own part of grad^T rows, 512 rows of an expert of which the gradient
of one is so many times larger, in tiles and with one scale for all rows of a column.

`--train FOLDER [--steps 200] [--seeds 1 2 3] [--width 64] [--rate 8e-3]` also trains the model of
bench/quality/small.py in fp32 with each precision and prints the differences of its held-out loss
(Student's interval, 95%, over seeds); a cell is a file of FOLDER, and what is there is not trained
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import find_commit
from bench.quality.small import byte_model, train_bytes
from bench.quality.sweep import interval
from ops.grouped_mlp import grouped_mlp
from ops.grouped_mlp.fp8 import rounded_columns, rounded_tiles
from ops.grouped_mlp.spec import Precision
from ops.permute import group_by_expert
from ops.testing import draw_expert_ids
from train.files.strict_json import dumps

SHAPES = ((64, 64), (256, 128), (1024, 512), (2048, 768), (4096, 512))
"""Hidden size and expert width."""
TOKENS = (16, 128, 512)
"""As many rows an expert has, with two experts and two to a token; a tile has 128."""
OUTLIERS = (
    ("none", 1),
    ("columns", 30),
    ("columns", 1000),
    ("tokens", 30),
    ("tokens", 1000),
    ("gradients", 30),
    ("gradients", 1000),
)
FACTORS = (1, 1_000, 30_000, 1_000_000, 30_000_000)
"""Of the gradient of one row. e4m3 has the values from its largest to 1 / 28,672 of it with all
their bits, and nothing below 1 / 458,752.
"""
NAMES = ("out", "grad_hidden", "grad_gates", "grad_gate_up", "grad_down")
ROUNDED: dict[str, tuple[torch.dtype, Precision]] = {
    "bf16": (torch.bfloat16, "native"),
    "fp8": (torch.float32, "fp8"),
    "fp8_all": (torch.float32, "fp8_all"),
}


def drawn(num_tokens: int, hidden_size: int, width: int, outlier: tuple[str, int]) -> list[Tensor]:
    """hidden, gates, gate_up, down, and the gradient of the output, all fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, grad_out = normal(num_tokens, hidden_size), normal(num_tokens, hidden_size)
    kind, factor = outlier
    if kind == "columns":
        hidden[:, ::128] *= factor
    elif kind == "tokens":
        hidden[::128] *= factor
    elif kind == "gradients":
        grad_out[::128] *= factor
    gates = torch.rand(num_tokens, 2, generator=generator)
    gate_up = normal(2, 2 * width, hidden_size) * hidden_size**-0.5
    down = normal(2, hidden_size, width) * width**-0.5
    return [hidden, gates, gate_up, down, grad_out]


def outcome(given: list[Tensor], dtype: torch.dtype, precision: Precision) -> list[Tensor]:
    """Output and gradients of one pass in a dtype, as fp32."""
    hidden, gates, gate_up, down, grad_out = given
    leaves = [
        tensor.to(torch.float32 if tensor is gates else dtype).requires_grad_()
        for tensor in (hidden.clone(), gates, gate_up.clone(), down.clone())
    ]
    places = group_by_expert(draw_expert_ids(len(hidden), 2, 2, "even"), 2)
    out = grouped_mlp(*leaves, *places, backend="torch", precision=precision)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype))
    return [tensor.detach().float() for tensor in (out, *grads)]


def errors(
    num_tokens: int, hidden_size: int, width: int, outlier: tuple[str, int]
) -> dict[str, Any]:
    given = drawn(num_tokens, hidden_size, width, outlier)
    exact = outcome(given, torch.float32, "native")
    row: dict[str, Any] = {
        "hidden_size": hidden_size,
        "width": width,
        "rows_of_an_expert": num_tokens,
        "outlier": outlier[0],
        "factor": outlier[1],
    }
    for kind, (dtype, precision) in ROUNDED.items():
        found = outcome(given, dtype, precision)
        row[kind] = {
            name: round(float((one - other).norm() / other.norm()), 4)
            for name, one, other in zip(NAMES, found, exact, strict=True)
        }
    return row


def beside(factor: int) -> dict[str, float]:
    """Error of what the 511 ordinary rows have in the product."""
    generator = torch.Generator().manual_seed(0)
    rows, grad = (torch.randn(512, 256, generator=generator) for _ in range(2))
    grad[200] *= factor
    ordinary = torch.arange(512) != 200
    exact = grad[ordinary].t() @ rows[ordinary]
    found: dict[str, float] = {"factor": factor}
    for name, rounds in (("tiles of 128", rounded_tiles), ("one scale", rounded_columns)):
        ours = rounds(grad)[ordinary].t() @ rounds(rows)[ordinary]
        found[name] = round(float((ours - exact).norm() / exact.norm()), 4)
    return found


def trained(folder: Path, width: int, rate: float, steps: int, seeds: list[int]) -> dict[str, Any]:
    """Held-out losses by precision and seed, and the differences from experts that do not round."""
    folder.mkdir(parents=True, exist_ok=True)
    precisions: tuple[Precision, ...] = ("native", "fp8", "fp8_all")
    losses: dict[str, list[float]] = {precision: [] for precision in precisions}
    for seed in seeds:
        for precision in precisions:
            path = folder / f"{precision}-{width}-{rate:g}-{steps}-{seed}.json"
            if not path.is_file():
                result = train_bytes(byte_model(width), rate, seed, steps, precision)
                scratch = path.with_suffix(".tmp")
                scratch.write_text(dumps(result) + "\n")
                scratch.replace(path)
            losses[precision].append(json.loads(path.read_text())["val_loss"])
            print(path.stem, losses[precision][-1], flush=True)
    found: dict[str, Any] = {
        "what": "held-out nats a byte, bench/quality/small.py, fp32",
        "width": width,
        "rate": rate,
        "steps": steps,
        "seeds": seeds,
        "losses": losses,
    }
    for one, other in (("fp8", "native"), ("fp8_all", "native"), ("fp8_all", "fp8")):
        pairs = [a - b for a, b in zip(losses[one], losses[other], strict=True)]
        middle, half = interval(pairs)
        found[f"{one} minus {other}"] = [round(middle, 5), round(half, 5) if seeds[1:] else None]
        print(f"{one} minus {other}: {middle:+.4f} ± {half:.4f} nats, {len(pairs)} seeds")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_experts")
    parser.add_argument("--largest", type=int, default=4096, help="hidden size")
    parser.add_argument("--train", type=Path, help="a folder: train small models there as well")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--json", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape[0] <= arguments.largest]
    few, tile, many = TOKENS
    cases = [(tile, *shape, outlier) for shape in shapes for outlier in OUTLIERS]
    cases += [(number, *shape, OUTLIERS[0]) for shape in shapes[:3] for number in (few, many)]
    rows = []
    for case in cases:
        row = errors(*case)
        rows.append(row)
        gradients = {kind: [row[kind][name] for name in NAMES[3:]] for kind in ROUNDED}
        print(*case[:3], *case[3], "gradients of gate_up and down", gradients, flush=True)
    found: dict[str, Any] = {
        "bench": "fp8_experts",
        "device": "cpu",
        "commit": find_commit(),
        "rows": rows,
    }
    found["beside"] = [beside(factor) for factor in FACTORS]
    for one in found["beside"]:
        print("beside a row with a gradient so many times larger", one)
    if arguments.train:
        found["training"] = trained(
            arguments.train, arguments.width, arguments.rate, arguments.steps, arguments.seeds
        )
    text = dumps(found, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(dumps(found))


if __name__ == "__main__":
    main()
