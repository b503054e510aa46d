"""Sparse attention against dense attention: time, memory, share of the roofline, decoding.

`python -m bench.sparse_attention --device cpu|cuda [--all] [--output FILE]`

cpu: forward and backward of one document of 2k to 32k tokens in one thread, with what they add to
    the memory that their inputs are in (a fresh process each), for the default spec, the same with
    a dropped tail, ranked in one pass (rank_lse=super), with entries of 64 tokens and with both,
    the default spec in plain torch, and torch's SDPA; and the exponents of N that fit them. Times
    are of the process, not of the clock, so that other work on the machine counts less.

cuda: bf16, random inputs, which is the worst case for the union factor (blocks that the queries of
    a kernel's tile select together, over those that one selects: 1 is best). The core shapes fit
    the time that bench/gpu.sh gives; --all adds the rest:

    model      32 heads, 4 key/value heads, d 128, block 64, top 16, window 512, one document of 8k
               to 128k tokens; at 64k tokens also ranked in one pass (rank_lse=super), with entries
               of 64 tokens, and both
    alike      the same at 64k, with queries that change along the document as slowly as those of
               trained models do: neighbours share 87 to 94% of what they select (Qwen's and
               MiniMax's models, union factors 1.8 to 2.9)
    fla        the NSA entry of flash-linear-attention's benchmarks: batch 4, 64/4 heads, block 64,
               top 16
    infllm     InfLLM-V2: 32/2 heads, block 64, top 64, 32k tokens
    fsa        FSA's sweep of group sizes: 4 key/value heads, groups of 1 to 16, (block, top) =
               (64, 16) and (128, 8)

Ours loads its tiles by pointers; `tma_ms` is the same with those of keys and values by the tensor
memory accelerator, for the default spec on devices that have one. configs.TMA should say which is
faster; `tma_equal` says whether both give the same bits.

Rivals are SDPA with cuDNN and with flash kernels; FlexAttention stands against the exact part
alone, with the same selection as its BlockMask, which neither side pays for, by its Triton kernels
and, where flash-attn-4 is installed, by FlashAttention-4's block-sparse ones. bench.common flushes
the L2 cache before every call. FLOPs are the useful ones, per head: 4d for an exact pair, 4d (order
2: 6d) for an entry of the tail, 2d (4d) for an entry that is scored; in the backward 10d for a pair
and 10d (16d) for an entry of the tail.

Both devices time the entries by themselves, under equal weights and under learned ones (on a GPU
beside plain torch): there `roofline_fraction` is their share of the memory's bandwidth, for keys,
values, logits and entries once, and in the backward pass for the gradients that are written.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import ROOT, Row, device_name, main, make_row, measure, roofline_ms
from bench.router import graphed
from bench.stored_experts import processor_ms
from ops.compile.launch import architecture, without_tma
from ops.device import peak_tflops
from ops.sparse_attention import (
    AttentionOutput,
    SparseAttentionSpec,
    chunked,
    cpp_backend,
    decode,
    select_backend,
    sparse_attention,
)
from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.cache import EntryCache
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.interface import Backend
from ops.sparse_attention.kernels.configs import attend_config, loading_by_tma
from ops.sparse_attention.ranking import union_counts
from ops.testing import assert_close
from train.files.strict_json import dumps

Call = Callable[[], object]
BF16 = torch.bfloat16
SPEC = SparseAttentionSpec()
FLEX: dict[str, Literal["TRITON", "FLASH"]] = {"flex": "TRITON", "flex_fa4": "FLASH"}
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


# CPU

CPU_REPEATS = {2048: 7, 4096: 5, 8192: 3, 16384: 2, 32768: 1}
CPU_RIVALS = ("chunked", "sdpa")
CPU_SPECS = {
    "scc": SPEC,
    "drop": replace(SPEC, tail="drop", order=0, coarse_block_size=SPEC.block_size),
    "one_pass": replace(SPEC, rank_lse="super"),
    "coarse_64": replace(SPEC, coarse_block_size=64),
    "one_pass_64": replace(SPEC, rank_lse="super", coarse_block_size=64),
}


def cpu_call(name: str, length: int) -> Call:
    """Forward and backward of one document: 4 heads, 2 key/value heads, d 64, fp32."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(length, heads, 64, generator=generator) for heads in (4, 2, 2)]
    grad = torch.randn(length, 4, 64, generator=generator)
    if name == "sdpa":
        inputs = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in inputs]
        grad = grad.transpose(0, 1).unsqueeze(0).contiguous()
    for x in inputs:
        x.requires_grad_()
    cu_seqlens = torch.tensor([0, length])

    def call() -> None:
        if name == "sdpa":
            # else a fallback with N^2 memory could slip in
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        else:
            spec, backend = CPU_SPECS.get(name, SPEC), "chunked" if name == "chunked" else "cpp"
            out = sparse_attention(*inputs, cu_seqlens, spec, backend=backend).out
        torch.autograd.grad(out, inputs, grad)

    return call


def print_cpu_samples(name: str, length: int, repeats: int) -> None:
    """JSON [MiB, [ms, ...]] of forward and backward, for a fresh process: by how much its peak
    memory is above what it holds before them, and the processor time of every call.
    """
    torch.set_num_threads(1)
    cpu_call(name, 256)()  # libraries are loaded, thread pools exist
    call, samples = cpu_call(name, length), []
    # The peak counts from here: making the inputs may have taken more than they are.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        samples.append(1e3 * (time.process_time() - begin))
    print(dumps([memory_mib("VmHWM") - before, samples]))


def memory_mib(name: str) -> float:
    """A line of /proc/self/status: VmRSS is what the process holds, VmHWM the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{name}:"))


def sample_cpu(name: str, length: int, repeats: int) -> tuple[float, float]:
    """(median ms, peak MiB)."""
    code = (
        f"from bench.sparse_attention import print_cpu_samples; print_cpu_samples({name!r}, "
        f"{length}, {repeats})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    peak, samples = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(samples), peak


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of log values over log lengths, least squares."""
    return statistics.linear_regression(
        [math.log(n) for n in lengths], [math.log(max(x, 1e-9)) for x in values]
    ).slope


def run_cpu() -> list[Row]:
    device, names = torch.device("cpu"), (*CPU_SPECS, *CPU_RIVALS)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for length, repeats in CPU_REPEATS.items():
        for name in names:
            milliseconds, peak = sample_cpu(name, length, repeats)
            times[name].append(milliseconds)
            peaks[name].append(peak)
            print(f"{name} N={length}: {milliseconds:.1f} ms, {peak:.1f} MiB", flush=True)
    found, lengths = [], list(CPU_REPEATS)
    for name in CPU_SPECS:
        for i, length in enumerate(lengths):
            extra: dict[str, float | str | None] = {
                "backend": "cpp",
                "threads": 1,
                "clock": "process",
                "mib": round(peaks[name][i], 1),
            }
            rivals = CPU_RIVALS if name == "scc" else ("sdpa",)
            extra |= {f"{rival}_mib": round(peaks[rival][i], 1) for rival in rivals}
            if length == lengths[-1]:
                extra |= {
                    f"{n}{quantity}_exponent": round(exponent(lengths, values[key]), 3)
                    for n, key in (("", name), ("sdpa_", "sdpa"))
                    for quantity, values in (("time", times), ("memory", peaks))
                }
            shape: dict[str, int | str] = {"spec": name, "N": length, "H": 4, "Hk": 2, "d": 64}
            found.append(
                make_row(
                    "sparse_attention.forward_backward",
                    shape,
                    torch.float32,
                    device,
                    {"ours": times[name][i]} | {rival: times[rival][i] for rival in rivals},
                    None,
                    **extra,
                )
            )
    return found


# CUDA


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    """One document each, all equal."""
    num_heads: int
    num_kv_heads: int
    spec: SparseAttentionSpec
    head_dim: int = 128
    flex: bool = False
    span: int = 0
    """Tokens in which a query turns into another direction; 0: each is drawn by itself."""


def model_shape(length: int, flex: bool = False, spec: SparseAttentionSpec = SPEC) -> Shape:
    return Shape("model", (length,), 32, 4, spec, flex=flex)


SPANS = (22, 9)
"""Of queries whose union factor is 1.8 and 2.9 for tiles of 16 queries, 8 heads a group."""
CORE = (
    model_shape(8192),
    model_shape(32768, flex=True),
    model_shape(65536),
    *(
        model_shape(65536, spec=CPU_SPECS[name])
        for name in ("one_pass", "coarse_64", "one_pass_64")
    ),
    *(replace(model_shape(65536), name="alike", span=span) for span in SPANS),
    model_shape(131072),
)
REST = (
    model_shape(16384),
    *(Shape("fla", (n,) * 4, 64, 4, SPEC) for n in (8192, 16384)),
    Shape("infllm", (32768,), 32, 2, replace(SPEC, top_k=64)),
    *(
        Shape(
            "fsa",
            (32768,),
            4 * group,
            4,
            replace(SPEC, block_size=block, coarse_block_size=block // 2, top_k=top_k),
        )
        for block, top_k in ((64, 16), (128, 8))
        for group in (1, 2, 4, 8, 16)
    ),
)
DECODE = tuple((n, rows) for n in (32768, 65536, 131072) for rows in (1, 16))
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """Of all heads: pairs of a query and a token it sees exactly, entries in tails, entries that
    are scored, and what dense attention would have.
    """

    exact: int
    tail: int
    scored: int
    dense: int

    def flops(self, dim: int, order: int, backward: bool) -> float:
        variance = 1 if order == 2 else 0
        if backward:
            return dim * (10 * self.exact + (10 + 6 * variance) * self.tail)
        return dim * (
            4 * self.exact + (4 + 2 * variance) * self.tail + (2 + 2 * variance) * self.scored
        )


def count_work(selected: Tensor, table: BlockTable, shape: Shape) -> Work:
    own, spec = table.block_of.long(), shape.spec
    first, sink_end, local = (
        x[own].long() for x in (table.first, table.sink_end, table.local_start)
    )
    start, token = table.start.long(), torch.arange(len(own), device=own.device)
    apart = sink_end < local
    forced = token + 1 - torch.where(apart, start[local], start[first])
    forced += torch.where(apart, start[sink_end] - start[first], 0)
    chosen, group = int((selected >= 0).sum()), shape.num_heads // shape.num_kv_heads
    candidates = int((local - sink_end).sum()) * shape.num_kv_heads
    tail = (candidates - chosen) * spec.entries_per_block * group if spec.tail == "coarse" else 0
    return Work(
        int(forced.sum()) * shape.num_heads + chosen * spec.block_size * group,
        tail,
        int(torch.where(apart, own - first, 0).sum()) * spec.entries_per_block * shape.num_heads,
        sum(n * (n + 1) // 2 for n in shape.lengths) * shape.num_heads,
    )


def tile_queries(device: torch.device, shape: Shape) -> int:
    """Queries of a tile of the forward kernel."""
    major, minor = torch.cuda.get_device_capability(device)
    group = shape.num_heads // shape.num_kv_heads
    return attend_config(
        shape.head_dim, group, shape.spec.block_size, BF16, 10 * major + minor
    ).queries


def dense_calls(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """SDPA by kernel: a forward and its inputs. A kernel that does not take grouped heads gets
    repeated keys and values, and a name that says so.
    """
    documents, group = len(shape.lengths), shape.num_heads // shape.num_kv_heads
    q, k, v = (x.detach().unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
    found: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    for name, kernel in DENSE.items():
        for grouped in (True, False):
            keys, values = (x if grouped else x.repeat_interleave(group, 1) for x in (k, v))
            inputs = [x.detach().requires_grad_() for x in (q, keys, values)]

            def forward(
                inputs: list[Tensor] = inputs, kernel: SDPBackend = kernel, grouped: bool = grouped
            ) -> Tensor:
                with sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(
                        *inputs, is_causal=True, enable_gqa=grouped
                    )

            try:
                forward()
            except RuntimeError as error:  # "No available kernel"
                print(
                    f"sdpa {name} does not take {shape.name}, grouped={grouped}: "
                    f"{str(error).splitlines()[0]}",
                    flush=True,
                )
                continue
            found[name if grouped else f"{name}_repeated_kv"] = forward, inputs
            break
    return found


def flex_call(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    table: BlockTable,
    kernels: Literal["TRITON", "FLASH"],
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """FlexAttention over the exact part: tiles of 128 x 128 that hold a block some query of the
    tile sees; the mask is per query. One document. kernels: whose; FLASH are FlashAttention-4's.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tile, size, group = 128, shape.spec.block_size, shape.num_heads // shape.num_kv_heads
    num_tokens, own = len(q), table.block_of.long()
    num_blocks = num_tokens // size
    assert len(shape.lengths) == 1 and num_tokens % tile == 0
    block = torch.arange(num_blocks, device=q.device)
    sink_end, local = (x[own].unsqueeze(1) for x in (table.sink_end, table.local_start))
    visible = ((block < sink_end) | (block >= local)) & (block <= own.unsqueeze(1))
    visible = visible.expand(shape.num_kv_heads, -1, -1)
    at = torch.where(selected < 0, num_blocks, selected.long())
    chosen = torch.zeros(
        *visible.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device
    ).scatter_(2, at, True)
    visible = (visible | chosen[..., :-1]).contiguous()
    # [Hk, N / tile, N / tile]
    tiles = visible.unflatten(1, (-1, tile)).any(2).unflatten(2, (-1, tile // size)).any(3)
    tiles = tiles.repeat_interleave(group, 0).unsqueeze(0)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & visible[h // group, i, j // size]

    block_mask = BlockMask.from_kv_blocks(
        tiles.sum(-1, dtype=torch.int32), order, BLOCK_SIZE=tile, mask_mod=mask
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = [
        x.detach().transpose(0, 1).unsqueeze(0).contiguous().requires_grad_() for x in (q, k, v)
    ]
    options = {"BACKEND": kernels}

    def call() -> Tensor:
        found: Tensor = compiled(
            *inputs, block_mask=block_mask, enable_gqa=True, kernel_options=options
        )
        return found

    return call, inputs


def three_ways(
    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor]]], device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of forward (without a graph), backward (of a kept graph) and both, by name;
    under a name that ends in _tma the kernels load by it.
    """

    def forward(name: str) -> None:
        with torch.no_grad(), loading_by_tma(name.endswith("_tma")):
            forwards[name][0]()

    kept = {name: (call(), inputs) for name, (call, inputs) in forwards.items()}
    grads = {name: torch.randn_like(out) for name, (out, _) in kept.items()}

    def backward(name: str) -> None:
        out, inputs = kept[name]
        with loading_by_tma(name.endswith("_tma")):
            torch.autograd.grad(out, inputs, grads[name], retain_graph=True)

    def both(name: str) -> None:
        call, inputs = forwards[name]
        with loading_by_tma(name.endswith("_tma")):
            torch.autograd.grad(call(), inputs, grads[name])

    found = {
        "forward": measure(
            {n: functools.partial(forward, n) for n in forwards},
            device,
            REPEATS,
        ),
        "backward": measure({n: functools.partial(backward, n) for n in forwards}, device, REPEATS),
    }
    kept.clear()
    return found | {
        "forward_backward": measure(
            {n: functools.partial(both, n) for n in forwards}, device, REPEATS
        )
    }


def check_exact(ours: Tensor, rival: Tensor, name: str) -> None:
    """Ours [T, H, d] against a rival's [1, H, T, d] on some rows, so that no rival wins by doing
    something else.
    """
    rows = torch.linspace(0, len(ours) - 1, 256, device=ours.device).long()
    assert_close(name, ours[rows], rival[0].transpose(0, 1)[rows])


def check_tma(call: Callable[[], Tensor], inputs: list[Tensor]) -> bool:
    """Whether output and gradients with TMA have the bits of those without; they must be close."""
    found = []
    for tma in (False, True):
        with loading_by_tma(tma):
            out = call()
            found.append((out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for name, pointers, boxes in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert_close(f"{name} by TMA", boxes, pointers)
    return all(torch.equal(*pair) for pair in zip(*found, strict=True))


def slowly(values: Tensor, span: int) -> Tensor:
    """values [T, ...] of independent normal draws -> as many normal draws, of which those closer
    than `span` tokens are alike: a blend of one in `span` of them and the next one.
    """
    place = torch.arange(len(values), device=values.device)
    first = place // span * span
    share = ((place - first) / span).view(-1, *[1] * (values.ndim - 1))
    following = values[(first + span).clamp_max(len(values) - 1)]
    return ((1 - share).sqrt() * values[first] + share.sqrt() * following).to(values.dtype)


def bench_shape(device: torch.device, shape: Shape) -> list[Row]:
    spec, num_tokens = shape.spec, sum(shape.lengths)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            num_tokens, heads, shape.head_dim, generator=generator, device=device, dtype=BF16
        )
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    if shape.span:
        q = slowly(q, shape.span)
    for x in (q, k, v):
        x.requires_grad_()
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(shape.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device
    )
    table = block_table(cu_seqlens, num_tokens, spec)

    def ours(**arguments: Tensor | bool) -> AttentionOutput:
        return sparse_attention(q, k, v, cu_seqlens, spec, **arguments)

    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    found = ours()
    torch.autograd.grad(found.out, (q, k, v), torch.ones_like(found.out))
    peak = (torch.cuda.max_memory_allocated(device) - resting) / 2**30
    selected, work = found.selected, count_work(found.selected, table, shape)
    different, of_one = union_counts(selected, tile_queries(device, shape))
    union = float(different / of_one.clamp_min(1e-9))
    tail_mass = float(found.tail_mass.mean())
    del found

    label: dict[str, int | str] = {
        "name": shape.name,
        "documents": len(shape.lengths),
        "N": shape.lengths[0],
        "H": shape.num_heads,
        "Hk": shape.num_kv_heads,
        "d": shape.head_dim,
        "block": spec.block_size,
        "top_k": spec.top_k,
        "window": spec.window_size,
        "span": shape.span,
        "coarse": spec.coarse_block_size,
        "rank_lse": spec.rank_lse,
    }
    element = q.element_size() * shape.head_dim * num_tokens
    read = element * (shape.num_heads + 2 * shape.num_kv_heads)
    forward_bytes = read + element * shape.num_heads
    num_bytes = {"forward": forward_bytes, "backward": 2 * read + 2 * element * shape.num_heads}
    flops = {way: work.flops(shape.head_dim, spec.order, way == "backward") for way in num_bytes}
    dense_flops = {
        "forward": 4.0 * shape.head_dim * work.dense,
        "backward": 10.0 * shape.head_dim * work.dense,
    }
    for table_ in (num_bytes, flops, dense_flops):
        table_["forward_backward"] = table_["forward"] + table_["backward"]

    rows = []
    calls = {"ours": (lambda: ours().out, [q, k, v])}
    equal = None
    if spec == SPEC and without_tma(architecture(device), k.detach().flatten(1)) is None:
        equal = check_tma(*calls["ours"])
        calls["ours_tma"] = calls["ours"]
    times = three_ways(calls | dense_calls(shape, q, k, v), device)
    peak_rate = peak_tflops(device_name(device))
    for way, by_name in times.items():
        by_tma = by_name.pop("ours_tma", None)
        rate = flops[way] / by_name["ours"] / 1e9
        dense = min((ms for name, ms in by_name.items() if name != "ours"), default=None)
        rows.append(
            make_row(
                f"sparse_attention.{way}",
                label,
                BF16,
                device,
                by_name,
                roofline_ms(device, flops[way], num_bytes[way]),
                backend=select_backend(q, k, spec),
                useful_tflops=round(rate, 1),
                peak_share=None if peak_rate is None else round(rate / peak_rate, 4),
                best_dense_tflops=None
                if dense is None
                else round(dense_flops[way] / dense / 1e9, 1),
                flop_ratio=round(dense_flops[way] / flops[way], 2),
                union_factor=round(union, 3),
                tail_mass=round(tail_mass, 4),
                peak_gib=round(peak, 3),
                tma_ms=None if by_tma is None else round(by_tma, 4),
                tma_equal=equal,
            )
        )
    if shape.flex:

        def exact_part() -> Tensor:
            return ours(selected=selected, coarse=False).out

        sides = {"ours": (exact_part, [q, k, v])}
        for name, kernels in FLEX.items():
            rival = flex_call(shape, q, k, v, selected, table, kernels)
            try:
                with torch.no_grad():
                    found = rival[0]()
            except Exception as error:  # the compiler's own, as many kinds as there are reasons
                if name == "flex":
                    raise
                print(f"{name} is left out: {str(error).splitlines()[0]}", flush=True)
                continue
            check_exact(exact_part().detach(), found, f"{name} with the same selection")
            sides[name] = rival
        for way, by_name in three_ways(sides, device).items():
            rows.append(
                make_row(
                    f"sparse_attention.exact_part.{way}",
                    label,
                    BF16,
                    device,
                    by_name,
                    None,
                    backend=select_backend(q, k, spec),
                    union_factor=round(union, 3),
                )
            )
    return rows


def decode_bytes(length: int, shape: Shape) -> tuple[int, int]:
    """(ours, dense) bytes of the caches that one new token of one document reads."""
    spec, own = shape.spec, (length - 1) // shape.spec.block_size
    local = max(0, own - spec.num_local_blocks + 1)
    sink_end = min(spec.num_sink_blocks, local)
    chosen = min(spec.top_k, local - sink_end)
    tokens = length - local * spec.block_size + (sink_end + chosen) * spec.block_size
    scored = own * spec.entries_per_block if sink_end < local else 0
    tail = (local - sink_end - chosen) * spec.entries_per_block if spec.tail == "coarse" else 0
    vector = 2 * shape.head_dim * shape.num_kv_heads
    return vector * (
        2 * tokens + (2 if spec.order == 2 else 1) * scored + tail
    ), vector * 2 * length


def bench_decode(device: torch.device, length: int, num_rows: int) -> list[Row]:
    shape = model_shape(length)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=BF16)

    q = normal(num_rows, shape.num_heads, shape.head_dim)
    keys, values = (normal(num_rows, length, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    cache = EntryCache(
        shape.spec, num_rows, length, shape.num_kv_heads, shape.head_dim, BF16, device
    )
    for row in range(num_rows):  # one at a time: pooling works on fp32 copies
        part = EntryCache(shape.spec, 1, length, shape.num_kv_heads, shape.head_dim, BF16, device)
        part.update(keys[row : row + 1], values[row : row + 1], 0)
        for whole, piece in zip(cache.entries, part.entries, strict=True):
            whole[row : row + 1] = piece

    def ours() -> Tensor:
        return decode(q, keys, values, cache.entries, length, shape.spec)[0]

    query, k, v = q.unsqueeze(2), keys.transpose(1, 2), values.transpose(1, 2)

    def dense(kernel: SDPBackend | None) -> Tensor:
        with sdpa_kernel(
            [*DENSE.values(), SDPBackend.EFFICIENT_ATTENTION] if kernel is None else kernel
        ):
            return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    calls: dict[str, Call] = {"ours": ours}
    for name, kernel in {**DENSE, "sdpa": None}.items():
        try:
            dense(kernel)
        except RuntimeError as error:
            print(f"sdpa {name} does not decode: {str(error).splitlines()[0]}", flush=True)
            continue
        calls[name] = functools.partial(dense, kernel)
    label: dict[str, int | str] = {
        "name": "decode",
        "rows": num_rows,
        "N": length,
        "H": shape.num_heads,
        "Hk": shape.num_kv_heads,
        "d": shape.head_dim,
    }
    ours_bytes, dense_bytes = (num_rows * x for x in decode_bytes(length, shape))
    sizes = {
        "mb": round(ours_bytes / 1e6, 2),
        "dense_mb": round(dense_bytes / 1e6, 2),
        "byte_ratio": round(dense_bytes / ours_bytes, 2),
    }
    bound = roofline_ms(device, 0.0, ours_bytes)
    rows = [
        make_row(
            "sparse_attention.decode",
            label,
            BF16,
            device,
            measure(calls, device, 31),
            bound,
            **sizes,
        )
    ]
    try:
        graphs = {name: graphed(call) for name, call in calls.items()}
    except RuntimeError as error:  # a call that waits for the host cannot be captured
        print(f"decoding as one CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return rows
    times = measure(graphs, device, 31)
    return [
        *rows,
        make_row("sparse_attention.decode.graph", label, BF16, device, times, bound, **sizes),
    ]


ENTRIES = {"cpu": (8192, 2, 64, torch.float32), "cuda": (65536, 4, 128, BF16)}
"""Tokens, key/value heads, d and dtype."""


def bench_entries(device: torch.device) -> list[Row]:
    """Entries of one document: equal weights, learned ones, and the gradients of these."""
    num_tokens, kv_heads, dim, dtype = ENTRIES[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    k, v = (normal(num_tokens, kv_heads, dim) for _ in "kv")
    logits = normal(num_tokens, kv_heads, 2, dim)
    table = block_table(torch.tensor([0, num_tokens], device=device), num_tokens, SPEC)
    shape = (kv_heads, len(table.start) * SPEC.entries_per_block, dim)
    grads = CoarseEntries(*(normal(*shape) for _ in CoarseEntries._fields))

    backends: dict[str, Backend] = {"ours": cpp_backend}
    if device.type == "cuda":
        from ops.sparse_attention import triton_backend

        backends = {"ours": triton_backend, "torch": chunked}
    else:
        cpp_backend.load_library()
    weighed = k, v, logits, table, SPEC
    ways: dict[str, Callable[[Backend], object]] = {
        "pool": lambda backend: backend.pool(k, v, table, SPEC),
        "gated": lambda backend: backend.weigh(*weighed),
        "gated.backward": lambda backend: backend.weigh_backward(*weighed, grads),
    }
    of_tokens, of_entries = k.numel(), 3 * math.prod(shape)
    values = {
        "pool": 2 * of_tokens + of_entries,
        "gated": 4 * of_tokens + of_entries,
        "gated.backward": 8 * of_tokens + of_entries,
    }
    label: dict[str, int | str] = {"N": num_tokens, "Hk": kv_heads, "d": dim}
    label["coarse"] = SPEC.coarse_block_size
    rows = []
    for way, call in ways.items():
        calls: dict[str, Call] = {n: functools.partial(call, b) for n, b in backends.items()}
        on_cpu = device.type == "cpu"
        times = processor_ms(calls, REPEATS) if on_cpu else measure(calls, device, 31)
        bound = roofline_ms(device, 0.0, values[way] * dtype.itemsize)
        rows.append(make_row(f"sparse_attention.entries.{way}", label, dtype, device, times, bound))
    return rows


def run(device: torch.device, everything: bool = False) -> list[Row]:
    if device.type == "cpu":
        return run_cpu() + bench_entries(device)
    rows = bench_entries(device)
    for shape in CORE + (REST if everything else ()):
        rows += bench_shape(device, shape)
        torch.cuda.empty_cache()
    for length, num_rows in DECODE:
        with torch.no_grad():
            rows += bench_decode(device, length, num_rows)
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--all", action="store_true")
    options.add_argument("--output")
    own, rest = options.parse_known_args()
    sys.argv[1:] = [*rest, *(["--json", own.output] if own.output else [])]
    main("sparse_attention", functools.partial(run, everything=own.all))
