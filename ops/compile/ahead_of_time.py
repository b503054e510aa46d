"""Compiling the Triton kernels ahead of time, without a GPU: registers, spills, shared memory,
tensor core instructions.

What is compiled is what would be launched: the wrappers run on small CPU tensors while their
launches are recorded. Results are kept in .cache/kernels/triton (or $LOADSTONE_KERNELS/triton)
under a hash of source, configuration and compiler.

    python -m ops.compile.ahead_of_time          # make compile-kernels
    python -m ops.compile.ahead_of_time 90       # one architecture
    python -m ops.compile.ahead_of_time 80 gather_ mark_rows     # kernels whose title has a word

It fails on spills, on too much shared memory, on accumulators that are transposed in registers, and
on descriptors that nothing is loaded by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.compile.cuda import cache_folder
from ops.compile.launch import Launch, record_launches

if TYPE_CHECKING:
    from ops.grouped_mlp.spec import Precision, Stored
    from ops.index_attention.spec import IndexSpec
    from ops.sparse_attention.spec import SparseAttentionSpec

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Largest dynamic shared memory of a block in bytes, by architecture (CUDA programming guide,
compute capabilities).
"""
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class Usage:
    registers: int  # of a thread
    spilled: int  # bytes of registers that were moved to memory, stores and loads
    shared: int  # bytes of a block
    products: str  # tensor core instructions in the PTX
    transposed: int  # accumulators of products that are transposed where they lie
    boxes: int  # loads by the tensor memory accelerator in the PTX


@dataclass(frozen=True)
class Job:
    """One kernel in one configuration, as triton.compile wants it."""

    title: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    @property
    def has_descriptors(self) -> bool:
        return any(kind.startswith("tensordesc") for kind in self.signature.values())

    def key(self, architecture: int) -> str:
        parts = (
            [field.name for field in dataclasses.fields(Usage)],
            triton.__version__,
            self.kernel.cache_key,
            self.signature,
            self.constants,
            self.attributes,
            self.options,
            architecture,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def job_of(launch: Launch, title: str) -> Job:
    """Specialise as Triton's launcher does: 1 and None are constants, multiples of 16 and pointers
    are marked so.
    """
    kernel = launch.kernel
    names = kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | {
        k: v for k, v in launch.options.items() if k in names
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = (
                f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
            )
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {k: v for k, v in launch.options.items() if k not in names}
    return Job(
        f"{kernel.__name__.removesuffix('_kernel')} {title}",
        kernel,
        signature,
        constants,
        attributes,
        options,
    )


def _named(launch: Launch) -> Iterator[tuple[str, Any]]:
    return zip(launch.kernel.arg_names, launch.args, strict=False)


def sparse_attention_launches(
    architecture: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    spec: SparseAttentionSpec,
    dtype: torch.dtype = torch.bfloat16,
    extras: bool = True,
    decoding: bool = True,
    coarse: bool = True,
) -> list[Launch]:
    """What a forward and backward, and the decoding of a token with and without pooled entries,
    would start, of 512 tokens.

    extras: bias, sink, noise of the selection and a gradient of the log-sum-exp. coarse: pooled
    entries take part in the forward and backward.
    """
    from ops.sparse_attention import triton_backend
    from ops.sparse_attention.blocks import block_table
    from ops.sparse_attention.problem import DecodeProblem, Problem
    from ops.sparse_attention.spec import SelectionNoise

    num_tokens = 512
    cu_seqlens = torch.tensor([0, num_tokens])
    table = block_table(cu_seqlens, num_tokens, spec)
    q = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype)
    k = torch.zeros(num_tokens, num_kv_heads, head_dim, dtype=dtype)
    selected = torch.full((num_kv_heads, num_tokens, spec.top_k), -1, dtype=torch.int32)
    lse = torch.zeros(num_tokens, num_heads)
    rows, sink = (lse, torch.zeros(num_heads)) if extras else (None, None)
    hashed = torch.zeros(num_tokens, dtype=torch.int64) if extras else None
    noise = SelectionNoise(temperature=1.0 if extras else 0.0)
    with record_launches(architecture) as launches:
        entries = triton_backend.pool(k, k, table, spec)
        logits = k.new_zeros(num_tokens, num_kv_heads, 2, head_dim)
        triton_backend.weigh(k, k, logits, table, spec)
        triton_backend.weigh_backward(k, k, logits, table, spec, entries)
        triton_backend.rank(q, entries, table, spec, hashed, noise)
        problem = Problem(
            q=q,
            k=k,
            v=k,
            bias=rows,
            sink=sink,
            selected=selected,
            entries=entries if coarse else None,
            table=table,
            spec=spec,
            exact=True,
            coarse=coarse,
        )
        triton_backend.attend(problem)
        triton_backend.attend_backward(problem, out=q, lse=lse, dout=q, dlse=rows)
        cache = k.expand(2, -1, -1, -1)
        stored = entries._replace(
            **{name: x.expand(2, -1, -1, -1) for name, x in entries._asdict().items()}
        )
        for length in (num_tokens, 1) if decoding else ():
            triton_backend.decode(
                DecodeProblem(
                    q=q[:2],
                    keys=cache,
                    values=cache,
                    entries=stored,
                    length=length,
                    spec=spec,
                    bias=None if rows is None else rows[:2],
                    sink=sink,
                    exact=True,
                    coarse=True,
                )
            )
    return launches


def gather_attention_launches(
    architecture: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    span: int,
    top_k: int | None,
    dtype: torch.dtype = torch.bfloat16,
    by_head: bool = False,
    window: bool = False,
    shared: bool = False,
) -> list[Launch]:
    """What a forward and backward of 512 tokens would start. top_k: None where nothing chooses and
    the first spans are seen; by_head: every key/value head chooses; shared: keys are values, and
    heads have sinks.
    """
    from ops.gather_attention import triton_backend
    from ops.gather_attention.problem import Gather

    num_tokens = 512
    q = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype)
    k = torch.zeros(2 * num_tokens, num_kv_heads, head_dim, dtype=dtype)
    of_tokens = torch.zeros(num_tokens, dtype=torch.int32)
    chosen = None
    if top_k is not None:
        chosen = torch.full((num_kv_heads if by_head else 1, num_tokens, top_k), -1).int()
    problem = Gather(
        q=q,
        k=k,
        v=None if shared else k,
        chosen=chosen,
        base=of_tokens,
        span=span,
        own_row=num_tokens if shared else 0,
        window_start=of_tokens if window else None,
        sink=torch.zeros(num_heads) if shared else None,
        first=of_tokens if top_k is None else None,
    )
    lse = torch.zeros(num_tokens, num_heads)
    with record_launches(architecture) as launches:
        triton_backend.attend(problem, q, lse, 0, num_tokens)
        if chosen is not None:
            triton_backend.masses(problem, lse, 0, num_tokens)
        triton_backend.attend_backward(problem, out=q, lse=lse, dout=q)
    return launches


def index_attention_launches(
    architecture: int,
    spec: IndexSpec,
    num_heads: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    weighted: bool = False,
    num_tokens: int = 512,
) -> list[Launch]:
    """What the choice of so many queries among as many keys, and teaching it, would start."""
    from ops.index_attention import triton_backend
    from ops.index_attention.triton_backend import Gradients, IndexTile

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    tile = IndexTile(
        tensor(num_tokens, num_heads, width),
        tensor(num_tokens, width),
        tensor(num_tokens, num_heads) if weighted else None,
        num_tokens * spec.block_size - 1,
        spec,
    )
    of_weights = None if tile.weights is None else tile.weights.float()
    into = Gradients(tile.queries.float(), tile.keys.float(), of_weights)
    with record_launches(architecture) as launches:
        scores = triton_backend.block_scores(tile)
        scores = triton_backend.block_scores(tile, with_best=True)
        chosen = triton_backend.largest(scores.values, spec.top_k)
        triton_backend.add_grads(tile, chosen.zero_(), chosen.float(), into)
    return launches


def teaching_launches(
    architecture: int,
    spec: SparseAttentionSpec,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    dense: bool = False,
) -> list[Launch]:
    """What teaches an index whose blocks all have a teacher would start of 512 tokens, but for what
    index_attention_launches has. dense: by tokens, not by entries.
    """
    from ops.index_attention import triton_backend

    num_tokens, r = 512, spec.entries_per_block
    number = num_tokens // spec.block_size
    q = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype)
    lse = torch.zeros(num_tokens, num_heads)
    pooled = q.new_zeros(num_kv_heads, number * r, head_dim)
    if dense:
        pooled = pooled.view(-1, num_kv_heads, head_dim).transpose(0, 1)
    counts = torch.zeros(num_tokens, dtype=torch.int32)
    with record_launches(architecture) as launches:
        masses = triton_backend.block_masses(
            q,
            pooled,
            lse,
            counts,
            *(0, 0, number, r),
            variances=pooled if spec.order == 2 else None,
            max_variance=spec.max_variance,
            num_pooled=spec.coarse_block_size,
            bias=lse if bias else None,
        )
        weights = lse[:, 0] if bias else None
        triton_backend.divergences(masses, masses, counts, weights, True)
    return launches


def decoding_launches(
    architecture: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    by_head: bool = False,
    shared: bool = False,
    num_tokens: int = 4,
) -> list[Launch]:
    """What attention of so many new tokens to 512 listed rows would start. by_head: every key/value
    head has its own; shared: keys are values, a second pool has a window, and heads have sinks.
    """
    from ops.gather_attention import triton_backend
    from ops.gather_attention.problem import Lookup, Source

    q = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype)
    k = torch.zeros(512, num_kv_heads, head_dim, dtype=dtype)
    rows = torch.zeros(num_kv_heads if by_head else 1, num_tokens, 512, dtype=torch.int32)
    source = Source(k, None if shared else k, rows)
    problem = Lookup(q, (source,))
    if shared:
        problem = Lookup(q, (source, source._replace(rows=rows[..., :128])), torch.zeros(num_heads))
    with record_launches(architecture) as launches:
        triton_backend.look_up(problem)
    return launches


def held_scores_launches(
    architecture: int,
    spec: IndexSpec,
    num_heads: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    weighted: bool = False,
    new: int = 1,
) -> list[Launch]:
    """What the scores of so many new tokens of four rows, of 512 keys each, would start."""
    from ops.index_attention import triton_backend

    queries = torch.zeros(4, new, num_heads, width, dtype=dtype)
    rows, keys = torch.zeros(4, 512, dtype=torch.int64), torch.zeros(512, width, dtype=dtype)
    weights = queries[..., 0] if weighted else None
    with record_launches(architecture) as launches:
        triton_backend.held_scores(queries, keys, weights, rows, rows[:, :new], spec)
    return launches


def gated_pool_launches(
    architecture: int,
    size: int,
    width: int,
    overlap: bool,
    dtype: torch.dtype = torch.bfloat16,
    num_tokens: int = 512,
) -> list[Launch]:
    """What entries of so many tokens, and their gradients, would start."""
    from ops.compressed_attention import closed_windows, triton_backend

    row_size = 2 * width if overlap else width
    content, gates = torch.zeros(num_tokens, 2 * row_size, dtype=dtype).split(row_size, 1)
    bias = torch.zeros(size, row_size)
    windows = closed_windows([0, num_tokens], size, content.device)
    given = content, gates, bias, windows.starts, windows.follows, overlap
    with record_launches(architecture) as launches:
        entries = triton_backend.pool(*given)
        triton_backend.pool_backward(*given, entries)
    return launches


def grouped_mlp_launches(
    architecture: int,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
    stored: Stored | None = None,
    precision: Precision = "native",
) -> list[Launch]:
    """What a forward and backward would start, of weights stored in 8 bits a forward alone; sizes:
    tokens, D, F, experts, slots of a token. Tensors have no memory.
    """
    from ops.grouped_mlp import triton_backend
    from ops.grouped_mlp.eight_bit import DTYPES

    num_tokens, hidden_size, width, num_experts, top_k = sizes

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden = tensor(num_tokens, hidden_size)
    weight = dtype if stored is None else DTYPES[stored]
    given = (
        hidden,
        tensor(num_tokens, top_k, dtype=torch.float32),
        tensor(num_experts, 2 * width, hidden_size, dtype=weight),
        tensor(num_experts, hidden_size, width, dtype=weight),
        tensor(num_tokens * top_k, dtype=torch.int32),
        tensor(num_tokens, top_k, dtype=torch.int32),
        tensor(num_experts + 1, dtype=torch.int32),
    )
    with record_launches(architecture) as launches:
        if stored is not None:
            widths = (2 * width, hidden_size)
            scales = [tensor(num_experts, w, dtype=torch.float32) for w in widths]
            triton_backend.forward(*given, False, (scales[0], scales[1]))
            return launches
        _, pre = triton_backend.forward(*given, not recompute, precision=precision)
        triton_backend.backward(hidden, *given, pre, precision)
    return launches


def sparse_attention_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table: every kernel for each head_dim, then groups, block sizes and dtypes
    at the extremes; those that can load by TMA both ways.
    """
    from ops.sparse_attention.kernels.configs import loading_by_tma
    from ops.sparse_attention.spec import SparseAttentionSpec

    def record(
        title: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        extras: bool = True,
        only: tuple[str, ...] = (),
        dtype: torch.dtype = torch.bfloat16,
        coarse: bool = True,
        **settings: Any,
    ) -> Iterator[Job]:
        spec = SparseAttentionSpec(**({"window_size": 64} | settings))
        for tma in (False, True):
            with loading_by_tma(tma):
                launches = sparse_attention_launches(
                    architecture,
                    *(num_heads, num_kv_heads, head_dim),
                    spec,
                    dtype,
                    extras,
                    coarse=coarse,
                )
            for launch in launches:
                name = launch.kernel.__name__.removesuffix("_kernel")
                if (only and name not in only) or (tma and not launch.options.get("TMA")):
                    continue
                words = [title, "tma"] if tma else [title]
                words += ["no entries"] if ("logits_ptr", None) in _named(launch) else []
                yield job_of(launch, " ".join(words))

    heavy = ("rank", "attend", "query_grad", "key_grad", "entry_grad")
    pools = ("pool", "weigh", "weigh_grad")
    yield from record("d128 G8 B64", 32, 4, 128)
    yield from record("d64 G4 B64", 16, 4, 64, only=heavy)
    yield from record(
        "d256 G8 B64",
        16,
        2,
        256,
        only=(*heavy, *pools, "key_grad_sum", "entry_grad_sum", "decode_attend"),
    )
    yield from record(
        "d128 G16 B128 r8",
        16,
        1,
        128,
        only=heavy,
        block_size=128,
        coarse_block_size=16,
        score="error_gain",
    )
    for head_dim, block_size, size in ((64, 32, 16), (128, 64, 64), (256, 128, 128)):
        yield from record(
            f"d{head_dim} of {size}",
            4,
            4,
            head_dim,
            only=pools,
            block_size=block_size,
            coarse_block_size=size,
        )
    yield from record("d128 of 32 fp32", 4, 4, 128, only=pools, dtype=torch.float32)
    yield from record("d128 of 32, one head", 4, 1, 128, only=pools)
    for head_dim, num_heads in ((64, 16), (128, 32), (256, 32)):
        title = f"d{head_dim} G{num_heads // 4} B64 one pass"
        yield from record(title, num_heads, 4, head_dim, only=("rank",), rank_lse="super")
    yield from record(
        "d128 G16 B128 r8 one pass",
        16,
        1,
        128,
        only=("rank",),
        block_size=128,
        coarse_block_size=16,
        score="error_gain",
        rank_lse="super",
    )
    yield from record(
        "d128 G1 B32 order 0",
        2,
        2,
        128,
        only=heavy,
        extras=False,
        block_size=32,
        order=0,
        score="max",
        top_k=64,
    )

    # the dense stage of attention to what an index chooses
    for head_dim, num_heads in ((64, 16), (128, 32), (256, 32)):
        yield from record(
            f"d{head_dim} G{num_heads // 4} B64 exact",
            *(num_heads, 4, head_dim),
            extras=False,
            only=("attend", "query_grad", "key_grad_sum"),
            coarse=False,
            top_k=0,
            num_sink_blocks=0,
            min_sparse_length=512,
        )


def gather_attention_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table, one for each rule and the widths at the extremes: of each what is
    not in those before it.
    """

    def record(
        title: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        only: tuple[str, ...],
        **settings: Any,
    ) -> Iterator[Job]:
        for launch in gather_attention_launches(
            architecture, num_heads, num_kv_heads, head_dim, **settings
        ):
            if launch.kernel.__name__.removesuffix("_kernel") in only:
                yield job_of(launch, title)

    heavy = ("gather_attend", "gather_query_grad", "gather_key_grad")
    every = (*heavy, "gather_masses", "mark_rows")
    by_token: dict[str, Any] = {"span": 1, "top_k": 2048}
    yield from record("d128 G8 tokens", 32, 4, 128, every, **by_token)
    yield from record("d64 G4 tokens", 16, 4, 64, heavy, **by_token)
    yield from record("d128 G8 fp32", 32, 4, 128, heavy, **by_token, dtype=torch.float32)
    yield from record("d128 G64 tokens", 64, 1, 128, heavy[:2], **by_token)
    yield from record("d256 G12 blocks of 4", 24, 2, 256, every, span=4, top_k=512, window=True)
    yield from record(
        "d128 G16 blocks of 128",
        64,
        4,
        128,
        every[:2] + every[3:],
        span=128,
        top_k=16,
        by_head=True,
    )
    # what teaches an index inside sparse attention
    for head_dim in (64, 128, 256):
        yield from record(
            f"d{head_dim} G8 blocks of 64",
            *(16, 2, head_dim),
            every[3:4],
            span=64,
            top_k=16,
            by_head=True,
        )
    yield from record(
        "d512 G64 entries", 64, 1, 512, every, span=1, top_k=512, window=True, shared=True
    )
    all_of_them: dict[str, Any] = {"span": 1, "top_k": None, "window": True, "shared": True}
    not_keys = (*heavy[:2], "mark_rows")
    yield from record("d512 G64 all entries", 64, 1, 512, not_keys, **all_of_them)
    yield from record("d128 G8 all entries", 8, 1, 128, not_keys, **all_of_them)
    yield from record(
        "d128 G8 all entries fp32", 8, 1, 128, not_keys, **all_of_them, dtype=torch.float32
    )


def index_attention_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table, one for each rule, then the widths and dtypes at the extremes."""
    from ops.index_attention.spec import IndexSpec

    def record(
        title: str, spec: IndexSpec, num_heads: int, width: int, **settings: Any
    ) -> Iterator[Job]:
        for launch in index_attention_launches(architecture, spec, num_heads, width, **settings):
            absent = spec.by_head and ("best_ptr", None) in _named(launch)
            yield job_of(launch, title + (" no best" if absent else ""))

    tokens, blocks = IndexSpec("dsa", 1, 2048), IndexSpec("msa", 128, 16)
    yield from record("w128 I32 tokens", tokens, 32, 128, weighted=True)
    yield from record("w128 I64 entries", IndexSpec("qsa", 4, 512), 64, 128, weighted=True)
    yield from record("w128 I4 blocks of 4", IndexSpec("qsa", 4, 512), 4, 128)
    yield from record("w128 I4 blocks of 128", blocks, 4, 128)
    yield from record("w64 I4 blocks of 64", IndexSpec("msa", 64, 16), 4, 64)
    yield from record("w256 I32 tokens", tokens, 32, 256, weighted=True)
    yield from record("w256 I4 blocks of 128", blocks, 4, 256)
    yield from record("w96 I8 tokens fp16", tokens, 8, 96, weighted=True, dtype=torch.float16)
    yield from record("w128 I32 fp32", tokens, 32, 128, weighted=True, dtype=torch.float32)
    # sizes of one are constants to the compiler
    yield from record("w64 I1 one token", tokens, 1, 64, weighted=True, num_tokens=1)
    yield from record("w64 I1 one block", IndexSpec("msa", 64, 16), 1, 64, num_tokens=1)
    yield from record("w128 I4 blocks of 128 fp32", blocks, 4, 128, dtype=torch.float32)


def teaching_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table: head dimensions, groups, entries of a block and dtypes at the
    extremes.
    """
    from ops.sparse_attention.spec import SparseAttentionSpec

    def record(
        title: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        divergence: bool = False,
        dense: bool = False,
        **settings: Any,
    ) -> Iterator[Job]:
        launches = teaching_launches(
            architecture,
            SparseAttentionSpec(**settings),
            *(num_heads, num_kv_heads, head_dim),
            dtype,
            bias,
            dense,
        )
        for launch in launches if divergence else launches[:1]:
            yield job_of(launch, title)

    yield from record("d128 G8 B64", 32, 4, 128, divergence=True)
    yield from record("d128 G8 B64, no bias", 32, 4, 128, bias=False, divergence=True)
    yield from record("d64 G4 B64", 16, 4, 64)
    yield from record("d256 G8 B64", 16, 2, 256)
    yield from record("d512 G8 B64", 16, 2, 512)
    yield from record("d128 G16 B128 r8", 16, 1, 128, block_size=128, coarse_block_size=16)
    yield from record("d128 G64 B64", 64, 1, 128)
    yield from record("d128 G1 B32 order 0", 2, 2, 128, bias=False, block_size=32, order=0)
    yield from record("d128 G8 B64 r64 fp16", 32, 4, 128, dtype=torch.float16, coarse_block_size=1)
    yield from record("d128 G8 fp32", 32, 4, 128, dtype=torch.float32)
    yield from record("d256 G16 B128 r128", 16, 1, 256, block_size=128, coarse_block_size=1)
    yield from record("d128 G8 B64 r64 fp32", 32, 4, 128, dtype=torch.float32, coarse_block_size=1)
    tokens: dict[str, Any] = {"bias": False, "order": 0, "coarse_block_size": 1, "dense": True}
    yield from record("d128 G8 tokens", 32, 4, 128, block_size=1, **tokens)
    yield from record("d64 G4 tokens", 16, 4, 64, block_size=1, **tokens)
    yield from record("d256 G12 tokens of 4", 24, 2, 256, block_size=4, **tokens)
    yield from record("d128 G16 tokens of 128", 64, 4, 128, block_size=128, **tokens)
    yield from record("d256 G16 tokens of 128", 64, 4, 256, block_size=128, **tokens)
    yield from record(
        "d128 G8 tokens of 128 fp32", 32, 4, 128, block_size=128, dtype=torch.float32, **tokens
    )


def decoding_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of both tables above, as decoding has them."""
    from ops.index_attention.spec import IndexSpec

    shapes: tuple[tuple[str, tuple[int, int, int], dict[str, Any]], ...] = (
        ("d128 G8", (32, 4, 128), {}),
        ("d128 G8 one token", (32, 4, 128), {"num_tokens": 1}),
        ("d64 G4", (16, 4, 64), {}),
        ("d128 G8 fp32", (32, 4, 128), {"dtype": torch.float32}),
        ("d256 G12", (24, 2, 256), {}),
        ("d128 G16 by head", (64, 4, 128), {"by_head": True}),
        ("d512 G64 entries", (64, 1, 512), {"shared": True}),
    )
    for title, sizes, settings in shapes:
        for launch in decoding_launches(architecture, *sizes, **settings):
            yield job_of(launch, title)

    tokens, blocks = IndexSpec("dsa", 1, 2048), IndexSpec("msa", 128, 16)
    for title, spec, heads, width, settings in (
        ("w128 I32 tokens", tokens, 32, 128, {"weighted": True}),
        ("w128 I32 several tokens", tokens, 32, 128, {"weighted": True, "new": 2}),
        ("w128 I64 entries", IndexSpec("qsa", 4, 512), 64, 128, {"weighted": True}),
        ("w128 I4 blocks of 4", IndexSpec("qsa", 4, 512), 4, 128, {}),
        ("w128 I4 blocks of 128", blocks, 4, 128, {}),
        ("w256 I64 tokens", tokens, 64, 256, {"weighted": True}),
        ("w256 I4 blocks of 128", blocks, 4, 256, {}),
        ("w128 I32 fp32", tokens, 32, 128, {"weighted": True, "dtype": torch.float32}),
        ("w128 I4 blocks of 128 fp32", blocks, 4, 128, {"dtype": torch.float32}),
    ):
        for launch in held_scores_launches(architecture, spec, heads, width, **settings):
            yield job_of(launch, title)


def gated_pool_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table: entries of CSA, HCA and CSA2, and keys of their index."""
    for title, *sizes in (
        ("w512 of 4, overlapping", 4, 512, True),
        ("w128 of 4, overlapping", 4, 128, True),
        ("w512 of 128", 128, 512, False),
        ("w512 of 2", 2, 512, False),
        ("w512 of 4, one window", 4, 512, True, torch.bfloat16, 4),
        ("w512 of 4, overlapping, fp32", 4, 512, True, torch.float32),
        ("w512 of 128, fp32", 128, 512, False, torch.float32),
    ):
        for launch in gated_pool_launches(architecture, *sizes):
            yield job_of(launch, str(title))


def grouped_mlp_jobs(architecture: int) -> Iterator[Job]:
    """The shapes of the table, tensors without memory: every kernel for the first, the products for
    the others.
    """

    def record(
        title: str,
        num_tokens: int,
        hidden_size: int,
        width: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        products: bool = True,
        stored: Stored | None = None,
        precision: Precision = "native",
    ) -> Iterator[Job]:
        sizes = num_tokens, hidden_size, width, num_experts, top_k
        for recompute in (False, True) if stored is None else (True,):
            for launch in grouped_mlp_launches(
                architecture, sizes, dtype, recompute, stored, precision
            ):
                absent = [
                    name.removesuffix("_ptr")
                    for name, value in _named(launch)
                    # descriptors depend on the architecture
                    if value is None and name.endswith("_ptr")
                ]
                if "STEP" in launch.options or not products:
                    yield job_of(launch, " no ".join([title, *absent]))

    yield from record("D4096 F1024 K4", 32768, 4096, 1024, 64, 4, products=False)
    yield from record("D2048 F768 K8", 32768, 2048, 768, 128, 8)
    yield from record("D1536 F256 K8", 32768, 1536, 256, 128, 8)
    yield from record("D2048 F768 few rows", 1024, 2048, 768, 128, 8)
    yield from record("D2872 F2872 K1", 8192, 2872, 2872, 8, 1)
    yield from record("D2048 F768 fp16", 32768, 2048, 768, 128, 8, torch.float16)
    yield from record("D2048 F768 fp32", 1024, 2048, 768, 128, 8, torch.float32)
    kinds: tuple[Stored, ...] = ("int8", "fp8")
    for kind in kinds:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = f"{kind} weights {str(dtype).removeprefix('torch.')}"
            yield from record(name, 32768, 2048, 768, 128, 8, dtype, stored=kind)
            yield from record(f"{name} few rows", 64, 2048, 768, 128, 8, dtype, stored=kind)
        yield from record(f"{kind} weights masked", 64, 2872, 2872, 8, 1, stored=kind)
    if architecture >= 89:
        products: tuple[Precision, ...] = ("fp8", "fp8_all")
        for low in products:
            yield from record(f"{low} D2048 F768 K8", 32768, 2048, 768, 128, 8, precision=low)
            yield from record(f"{low} few rows", 1024, 2048, 768, 128, 8, precision=low)
            yield from record(f"{low} masked", 8192, 2872, 2872, 8, 1, precision=low)


@functools.cache
def jobs_of(architecture: int) -> dict[str, Job]:
    """Jobs by title; a kernel that one call launches several times counts once."""
    jobs: dict[str, Job] = {}
    for job in itertools.chain(
        sparse_attention_jobs(architecture),
        gather_attention_jobs(architecture),
        index_attention_jobs(architecture),
        teaching_jobs(architecture),
        decoding_jobs(architecture),
        gated_pool_jobs(architecture),
        grouped_mlp_jobs(architecture),
    ):
        jobs.setdefault(job.title, job)
    return jobs


def compile_job(title: str, architecture: int) -> Usage | str | None:
    """Compile, or take the result of an earlier run with the same content; what the compiler said
    where it failed; None where the architecture has no such kernel.
    """
    job = jobs_of(architecture).get(title)
    if job is None:
        return None
    path = cache_folder() / "triton" / f"{job.key(architecture)}.json"
    if path.is_file():
        return Usage(**json.loads(path.read_text()))
    try:
        usage = _compile(job, architecture)
    except (triton.CompilationError, triton.runtime.errors.PTXASError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(asdict(usage), allow_nan=False))
    scratch.replace(path)
    return usage


def _compile(job: Job, architecture: int) -> Usage:
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    source = ASTSource(
        fn=job.kernel, signature=job.signature, constexprs=job.constants, attrs=job.attributes
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options=job.options
        )
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said.getvalue()))
    ptx = binary.asm["ptx"]
    products = {name: ptx.count(pattern) for name, pattern in _INSTRUCTIONS.items()}
    return Usage(
        _registers(binary.asm["cubin"]),
        spilled,
        binary.metadata.shared,
        " ".join(f"{n} {name}" for name, n in products.items() if n),
        transposed_accumulators(binary.asm["ttgir"]),
        ptx.count("cp.async.bulk.tensor"),
    )


def transposed_accumulators(program: str) -> int:
    """How often a compiled program (Triton's GPU dialect) transposes what a product left in its
    registers. Since Triton 3.4 such a transposed accumulator is stored wrongly on Hopper, without a
    word (flash-linear-attention 640, 826, 984): kernels compute the transposed product instead.
    """
    layouts = re.findall(r"(#\w+) = #ttg\.nvidia_mma<", program)
    transposed = re.findall(r"= tt\.trans .*: tensor<[^<>]*, (#\w+)> ->", program)
    return sum(layout in layouts for layout in transposed)


def complaints(job: Job, usage: Usage, architecture: int) -> list[str]:
    """What of a compiled kernel is refused."""
    found = [f"SPILLS {usage.spilled} BYTES"] if usage.spilled else []
    if usage.shared > SHARED_MEMORY[architecture]:
        found.append("TOO MUCH SHARED MEMORY")
    if usage.transposed:
        found.append(f"TRANSPOSES {usage.transposed} ACCUMULATORS")
    if job.has_descriptors and not usage.boxes:
        found.append("DESCRIPTORS WITHOUT TMA")
    return found


def _registers(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", said))


def main(arguments: list[str]) -> int:
    """Print a table; 1 if a kernel spills, takes too much shared memory, transposes an accumulator,
    leaves its descriptors unused or does not compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print(
            "TRITON_INTERPRET=1 is set: kernels are interpreted in this process and cannot be "
            "compiled"
        )
        return 1
    architectures = [int(a) for a in arguments if a.isdecimal()] or list(SHARED_MEMORY)
    words = [a for a in arguments if not a.isdecimal()]
    jobs = {title: job for a in reversed(architectures) for title, job in jobs_of(a).items()}
    titles = [title for title in jobs if not words or any(word in title for word in words)]
    if not titles:
        print(f"no kernel has {' or '.join(words)} in its title; titles begin with its name")
        return 1
    print(
        f"triton {triton.__version__}: warps, then registers, KiB of shared memory, tensor core "
        f"instructions and loads by TMA on sm_{', sm_'.join(map(str, architectures))}"
    )
    failed = False
    with ProcessPoolExecutor(
        int(os.environ.get("MAX_JOBS", "2")), multiprocessing.get_context("spawn")
    ) as pool:
        results = pool.map(
            compile_job, *zip(*itertools.product(titles, architectures), strict=True)
        )
        for title in titles:
            row = f"{title:34}{jobs[title].options.get('num_warps', 4):2}"
            for architecture in architectures:
                usage = next(results)
                if usage is None:
                    row += f" |{'none':>4}{'':25}"
                    continue
                if isinstance(usage, str):
                    failed, row = True, f"{row} | {usage}"
                    continue
                refused = complaints(jobs_of(architecture)[title], usage, architecture)
                failed |= bool(refused)
                row += f" |{usage.registers:4}{usage.shared / 1024:6.1f} {usage.products:11}"
                row += f"{usage.boxes:3} tma" if usage.boxes else " " * 7
                row += f" {', '.join(refused)}" if refused else ""
            print(row.rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
