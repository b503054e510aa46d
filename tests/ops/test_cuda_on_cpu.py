"""ops/csrc/cuda_on_cpu.h: kernels on the CPU compute what CUDA promises, and mistakes show or abort
with a sentence.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).resolve().parent.parent.parent / "ops" / "csrc"
GXX = [
    "g++",
    "-x",
    "c++",
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DLOADSTONE_CUDA_ON_CPU",
    f"-I{CSRC}",
]
ORDERS = ["", "1", "2", "3", "4", "5"]
"""Values of CUDA_ON_CPU_SEED; the empty one is the fixed order."""

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="cuda_on_cpu.h needs g++ and an x86-64 processor",
)

KERNELS = r"""
#include "cuda_compat.h"

constexpr unsigned ALL = 0xffffffffu;

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };
static_assert(Same<decltype(min(-1, 1u)), unsigned>::value, "");
static_assert(Same<decltype(max(-1l, 1ul)), unsigned long>::value, "");
static_assert(Same<decltype(min(1.0f, 2.0f)), float>::value, "");
static_assert(Same<decltype(max(1.0f, 2.0)), double>::value, "");
static_assert(Same<decltype(min(1ll, 2ull)), unsigned long long>::value, "");
static_assert(Same<decltype(max(1, 2)), int>::value, "");
static_assert(alignof(float2) == 8 && alignof(uint2) == 8, "");
static_assert(alignof(float4) == 16 && alignof(int4) == 16, "");

// Sums of blocks: shuffles inside the warps, shared memory between them.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(ALL, value, distance);
  return value;
}

__global__ void __launch_bounds__(256)
block_sums(const float* __restrict__ in, float* __restrict__ sums) {
  DYNAMIC_SHARED(float, warp_sums);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  const float sum = warp_sum(__ldg(&in[blockIdx.x * blockDim.x + threadIdx.x]));
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  const float total = warp_sum(lane < num_warps ? warp_sums[lane] : 0.0f);
  if (lane == 0) sums[blockIdx.x] = total;
}

extern "C" int run_block_sums(const float* in, float* sums, int num_blocks, int num_threads) {
  LAUNCH(block_sums, num_blocks, num_threads, num_threads / 32 * sizeof(float), nullptr, in, sums);
  return last_launch_error();
}

template <class T>
__global__ void shuffles(const T* in, T* out, int distance, int width) {
  const int lane = threadIdx.x;
  const T value = in[lane];
  out[lane] = __shfl_sync(ALL, value, distance, width);
  out[lane + 32] = __shfl_up_sync(ALL, value, distance, width);
  out[lane + 64] = __shfl_down_sync(ALL, value, distance, width);
  out[lane + 96] = __shfl_xor_sync(ALL, value, distance, width);
}

template <class T>
int launch_shuffles(const void* in, void* out, int distance, int width) {
  LAUNCH(shuffles<T>, 1, 32, 0, nullptr, static_cast<const T*>(in), static_cast<T*>(out), distance,
         width);
  return last_launch_error();
}

extern "C" int run_shuffles(const void* in, void* out, int distance, int width, int type) {
  switch (type) {
    case 0: return launch_shuffles<float>(in, out, distance, width);
    case 1: return launch_shuffles<double>(in, out, distance, width);
    case 2: return launch_shuffles<int32_t>(in, out, distance, width);
    case 3: return launch_shuffles<uint32_t>(in, out, distance, width);
    case 4: return launch_shuffles<int64_t>(in, out, distance, width);
    default: return launch_shuffles<uint64_t>(in, out, distance, width);
  }
}

// Half-warps vote apart, in different branches; then the last lane is read by a warp that left out
// lane 0.
__global__ void votes(const int* in, unsigned* ballots, int* any_all, int* bits, int* last) {
  const int lane = threadIdx.x, flag = in[lane];
  unsigned ballot;
  int any, all;
  if (lane < 16) {
    ballot = __ballot_sync(0x0000ffffu, flag);
    any = __any_sync(0x0000ffffu, flag);
    all = __all_sync(0x0000ffffu, flag);
  } else {
    ballot = __ballot_sync(0xffff0000u, flag);
    any = __any_sync(0xffff0000u, flag);
    all = __all_sync(0xffff0000u, flag);
  }
  ballots[lane] = ballot;
  any_all[lane] = any + 2 * all;
  bits[lane] = __popc(ballot) | __ffs(ballot) << 8 | __clz(ballot) << 16;
  if (lane > 0) last[lane] = __shfl_sync(0xfffffffeu, lane + 100, 31);
}

extern "C" int run_votes(const int* in, unsigned* ballots, int* any_all, int* bits, int* last) {
  LAUNCH(votes, 1, 32, 0, nullptr, in, ballots, any_all, bits, last);
  return last_launch_error();
}

// How many elements before each one are flagged, and how many in all: a scan in shared memory.
// Without barrier number `dropped` (1 to 3) the result depends on the order of threads.
template <int dropped>
__global__ void scan(const int* flags, int* ranks, int* total) {
  DYNAMIC_SHARED(unsigned, sums);    // unsigned: without a barrier, garbage is added and wraps
  const int i = threadIdx.x, flag = flags[i] != 0;
  sums[i] = flag;
  if (dropped != 1) __syncthreads();
  for (int distance = 1; distance < static_cast<int>(blockDim.x); distance *= 2) {
    const unsigned addend = i >= distance ? sums[i - distance] : 0;
    if (dropped != 2) __syncthreads();
    sums[i] += addend;
    if (dropped != 3) __syncthreads();
  }
  ranks[i] = sums[i] - flag;
  if (i == 0) *total = sums[blockDim.x - 1];
}

extern "C" int run_scan(const int* flags, int* ranks, int* total, int num_threads, int dropped) {
  const size_t shared_bytes = num_threads * sizeof(int);
  switch (dropped) {
    case 0: LAUNCH(scan<0>, 1, num_threads, shared_bytes, nullptr, flags, ranks, total); break;
    case 1: LAUNCH(scan<1>, 1, num_threads, shared_bytes, nullptr, flags, ranks, total); break;
    case 2: LAUNCH(scan<2>, 1, num_threads, shared_bytes, nullptr, flags, ranks, total); break;
    default: LAUNCH(scan<3>, 1, num_threads, shared_bytes, nullptr, flags, ranks, total);
  }
  return last_launch_error();
}

// Each warp reverses its elements through shared memory.
template <bool with_barrier, int warp_size>
__global__ void reverse_warps(const int* in, int* out) {
  DYNAMIC_SHARED(int, buffer);
  const int i = threadIdx.x;
  buffer[i] = in[i];
  if (with_barrier) __syncwarp();
  out[i] = buffer[i ^ (warp_size - 1)];
}

extern "C" int run_reverse_warps(const int* in, int* out, int with_barrier) {
  if (with_barrier)
    LAUNCH((reverse_warps<true, 32>), 1, 64, 256, nullptr, in, out);
  else
    LAUNCH((reverse_warps<false, 32>), 1, 64, 256, nullptr, in, out);
  return last_launch_error();
}

// Counts per key, the largest key, and the set of keys below 64, over all blocks.
__global__ void histogram(const int* keys, int num_keys, int num_bins, int* counts,
                          unsigned* largest, unsigned long long* seen) {
  DYNAMIC_SHARED(int, local);
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_keys) {
    const int key = keys[i];
    atomicAdd(&local[key], 1u);
    atomicMax(largest, static_cast<unsigned>(key));
    if (key < 64) atomicOr(seen, 1ull << key);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x)
    if (local[bin]) atomicAdd(&counts[bin], local[bin]);
}

extern "C" int run_histogram(const int* keys, int num_keys, int num_bins, int* counts,
                             unsigned* largest, unsigned long long* seen, void* stream) {
  cudaMemsetAsync(counts, 0, num_bins * sizeof(int), (cudaStream_t)stream);
  cudaMemsetAsync(largest, 0, sizeof(unsigned), (cudaStream_t)stream);
  cudaMemsetAsync(seen, 0, sizeof(unsigned long long), (cudaStream_t)stream);
  LAUNCH(histogram, (num_keys + 95) / 96, 96, num_bins * sizeof(int), (cudaStream_t)stream, keys,
         num_keys, num_bins, counts, largest, seen);
  return last_launch_error();
}

// Every thread writes its place in a grid of three dimensions as a vector, and the last warp is not
// a whole one. Threads after the first ten of a block leave before the barrier.
__global__ void places(uint4* out, float4* fractions) {
  const dim3 block = blockDim;
  const unsigned thread = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
  const unsigned block_number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned number = block_number * (block.x * block.y * block.z) + thread;
  fractions[number] = make_float4(number / 2.0f, fmaf(number, 0.5f, 1.0f), sqrtf(number),
                                  __uint_as_float(number));
  out[number] = make_uint4(threadIdx.x, threadIdx.y, threadIdx.z,
                           blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
  if (thread >= 10) return;
  __syncthreads();
  const uint4 next = out[number - thread + (thread + 1) % 10];
  __syncthreads();
  out[number].w += next.w * 1000;
}

extern "C" int run_places(uint4* out, float4* fractions) {
  LAUNCH(places, dim3(2, 3, 4), dim3(5, 4, 2), 0, nullptr, out, fractions);
  return last_launch_error();
}

__global__ void float_extremes(const float2* in, float2* out) {
  const float2 pair = in[threadIdx.x];
  out[threadIdx.x] = make_float2(min(pair.x, pair.y), max(pair.x, pair.y));
}

extern "C" int run_float_extremes(const float2* in, float2* out) {
  LAUNCH(float_extremes, 1, 3, 0, nullptr, in, out);
  return last_launch_error();
}

// The first and the last four bytes of the largest shared memory, before anything is written.
__global__ void fresh_shared(unsigned* out) {
  DYNAMIC_SHARED(unsigned, words);
  out[2 * blockIdx.x] = words[0];
  out[2 * blockIdx.x + 1] = words[227 * 256 - 1];
  words[0] = words[227 * 256 - 1] = 0;
}

extern "C" int run_fresh_shared(unsigned* out) {
  LAUNCH(fresh_shared, 2, 1, 227 << 10, nullptr, out);
  return last_launch_error();
}
"""

FAILURES = r"""
#include "cuda_compat.h"

constexpr unsigned ALL = 0xffffffffu;

__global__ void nothing() {}
extern "C" void launch_nothing(int grid, int block, int shared_bytes) {
  LAUNCH(nothing, grid, block, shared_bytes, nullptr);
}

// Half of a warp waits for the other half, which waits for the first.
__global__ void split_barrier() {
  if (threadIdx.x < 16) __syncthreads();
  else __syncwarp();
}
extern "C" void launch_split_barrier() { LAUNCH(split_barrier, 1, 64, 0, nullptr); }

__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
extern "C" void launch_two_barriers() { LAUNCH(two_barriers, 1, 64, 0, nullptr); }

__global__ void write_shared(int index) {
  DYNAMIC_SHARED(int, buffer);
  if (blockIdx.x == 1) buffer[index] = 1;
}
extern "C" void launch_write_shared(int index) { LAUNCH(write_shared, 3, 32, 128, nullptr, index); }

__global__ void shuffle_after_exit(int* out) {
  if (threadIdx.x == 7) return;
  *out = __shfl_xor_sync(ALL, 1, 1);
}
extern "C" void launch_shuffle_after_exit(int num_threads) {
  int out = 0;
  LAUNCH(shuffle_after_exit, 1, num_threads, 0, nullptr, &out);
}

__global__ void vote_without_own_lane(int* out) {
  *out = __any_sync(0x2u, 1);
}
extern "C" void launch_vote_without_own_lane() {
  int out = 0;
  LAUNCH(vote_without_own_lane, 1, 32, 0, nullptr, &out);
}

__global__ void shuffle_never_joined(int* out) {
  if (threadIdx.x == 3) __syncthreads();
  else *out = __shfl_down_sync(ALL, 1, 1);
}
extern "C" void launch_shuffle_never_joined() {
  int out = 0;
  LAUNCH(shuffle_never_joined, 1, 32, 0, nullptr, &out);
}

__device__ __noinline__ int descend(int depth) {
  volatile int frame[4096];
  frame[depth % 4096] = depth;
  return depth == 0 ? 0 : descend(depth - 1) + frame[depth % 4096];
}
__global__ void overflow_stack(int depth, int* out) {
  *out = descend(depth);
}
extern "C" void launch_overflow_stack(int depth) {
  int out = 0;
  LAUNCH(overflow_stack, 1, 32, 0, nullptr, depth, &out);
}
"""


def compile_library(source: str, folder: Path, *options: str) -> Path:
    (folder / "kernels.cu").write_text(source)
    library = folder / "kernels.so"
    subprocess.run(
        [*GXX, *options, "-fPIC", "-shared", str(folder / "kernels.cu"), "-o", str(library)],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_library(KERNELS, tmp_path_factory.mktemp("kernels"))))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Path:
    return compile_library(FAILURES, tmp_path_factory.mktemp("failures"))


@pytest.fixture(params=ORDERS, ids=lambda seed: f"seed {seed}" if seed else "fixed order")
def order(request, monkeypatch) -> str:
    monkeypatch.setenv("CUDA_ON_CPU_SEED", request.param)
    return request.param


def call(function, *arguments) -> None:
    """Call a launcher with arrays and ints."""
    assert all(a.flags.c_contiguous for a in arguments if isinstance(a, np.ndarray))
    code = function(
        *[ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
    )
    assert code == 0, code


def tree_sum(values: np.ndarray) -> np.ndarray:
    """Float sums over the last axis of 32, in the order of a butterfly of shuffles."""
    lanes = np.arange(32)
    for distance in (16, 8, 4, 2, 1):
        values = values + values[..., lanes ^ distance]
    return values[..., 0]


def run_scan(kernels: ctypes.CDLL, flags: np.ndarray, dropped: int = 0) -> list[int]:
    ranks, total = np.zeros(len(flags), np.int32), np.zeros(1, np.int32)
    call(kernels.run_scan, flags, ranks, total, len(flags), dropped)
    return [*ranks.tolist(), int(total[0])]


def expected_scan(flags: np.ndarray) -> list[int]:
    return [0, *np.cumsum(flags).tolist()]


def run_histogram(
    kernels: ctypes.CDLL, keys: np.ndarray, num_bins: int
) -> tuple[np.ndarray, int, int]:
    counts, largest, seen = (
        np.full(num_bins, -1, np.int32),
        np.full(1, 7, np.uint32),
        np.full(1, 7, np.uint64),
    )
    call(kernels.run_histogram, keys, len(keys), num_bins, counts, largest, seen, None)
    return counts, int(largest[0]), int(seen[0])


def assert_histogram(kernels: ctypes.CDLL) -> None:
    keys = np.random.default_rng(0).integers(0, 90, 1000).astype(np.int32)
    counts, largest, seen = run_histogram(kernels, keys, 100)
    assert np.array_equal(counts, np.bincount(keys, minlength=100))
    assert largest == keys.max() and seen == sum(1 << int(key) for key in set(keys[keys < 64]))


# What CUDA promises


@pytest.mark.parametrize("num_threads", [32, 256, 1024])
def test_block_sums_round_as_the_tree_of_shuffles_does(kernels, order, num_threads):
    values = np.random.default_rng(1).standard_normal((3, num_threads)).astype(np.float32)
    sums = np.zeros(3, np.float32)
    call(kernels.run_block_sums, values, sums, 3, num_threads)
    warp_sums = np.zeros((3, 32), np.float32)
    warp_sums[:, : num_threads // 32] = tree_sum(values.reshape(3, -1, 32))
    assert np.array_equal(sums, tree_sum(warp_sums))


@pytest.mark.parametrize("width", [2, 8, 16, 32])
@pytest.mark.parametrize("distance", [0, 1, 3, 9, 31])
def test_shuffles_stay_in_their_segment_as_shfl_sync_does(kernels, distance, width):
    lanes = np.arange(32)
    first, last = lanes & -width, (lanes & -width) + width - 1
    up, down, xor = lanes - distance, lanes + distance, lanes ^ distance
    sources = np.stack(
        [
            first | (distance & (width - 1)),
            np.where(up >= first, up, lanes),
            np.where(down <= last, down, lanes),
            np.where(xor <= last, xor, lanes),
        ]
    )
    for type_number, dtype in enumerate(
        [np.float32, np.float64, np.int32, np.uint32, np.int64, np.uint64]
    ):
        bits = np.random.default_rng(2).bytes(32 * np.dtype(dtype).itemsize)
        values, out = np.frombuffer(bits, dtype), np.zeros((4, 32), dtype)
        call(kernels.run_shuffles, values, out, distance, width, type_number)
        assert out.tobytes() == values[sources].tobytes(), dtype


def test_votes_of_half_warps_do_not_mix(kernels, order):
    for flags in (np.zeros(32, np.int32), np.arange(32, dtype=np.int32), np.full(32, -1, np.int32)):
        ballots, any_all = np.zeros(32, np.uint32), np.zeros(32, np.int32)
        bits, last = np.zeros(32, np.int32), np.zeros(32, np.int32)
        call(kernels.run_votes, flags, ballots, any_all, bits, last)
        for half in (range(16), range(16, 32)):
            votes = [bool(flags[lane]) for lane in half]
            ballot = sum(1 << lane for lane in half if flags[lane])
            lowest, leading = (ballot & -ballot).bit_length(), 32 - ballot.bit_length()
            assert set(ballots[half]) == {ballot}
            assert set(any_all[half]) == {any(votes) + 2 * all(votes)}
            assert set(bits[half]) == {sum(votes) | lowest << 8 | leading << 16}
        assert last[0] == 0 and set(last[1:]) == {131}


@pytest.mark.parametrize("num_threads", [1, 31, 256, 1000])
def test_ranks_by_a_scan_in_shared_memory_keep_the_order(kernels, order, num_threads):
    flags = np.random.default_rng(num_threads).integers(0, 2, num_threads).astype(np.int32)
    assert run_scan(kernels, flags) == expected_scan(flags)


def test_integer_atomics_add_up_across_blocks(kernels, order):
    assert_histogram(kernels)


def test_blocks_spread_over_openmp_threads(tmp_path, monkeypatch):
    library = ctypes.CDLL(str(compile_library(KERNELS, tmp_path, "-fopenmp")))
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(4)  # of all OpenMP of the process, torch's as well
    try:
        for seed in ORDERS:
            monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
            assert_histogram(library)
    finally:
        library.omp_set_num_threads(before)


def test_threads_know_their_place_and_may_leave_before_a_barrier(kernels, order):
    out, fractions = (
        np.zeros((4, 3, 2, 40, 4), np.uint32),
        np.zeros((4 * 3 * 2 * 40, 4), np.float32),
    )
    call(kernels.run_places, out, fractions)
    z, y, x, thread = np.indices(out.shape[:-1])
    block = x + 10 * y + 100 * z
    expected = np.stack(
        [thread % 5, thread // 5 % 4, thread // 20, np.where(thread < 10, block * 1001, block)], -1
    )
    assert np.array_equal(out, expected)
    number = np.arange(len(fractions), dtype=np.uint32)
    half = number.astype(np.float32) / 2
    assert np.array_equal(
        fractions[:, :3], np.stack([half, half + 1, np.sqrt(number.astype(np.float32))], -1)
    )
    assert fractions[:, 3].tobytes() == number.tobytes()


def test_float_min_and_max_drop_nan_and_order_zeros(kernels):
    pairs, out = (
        np.array([[0.0, -0.0], [np.nan, 2.0], [-3.0, np.nan]], np.float32),
        np.zeros((3, 2), np.float32),
    )
    call(kernels.run_float_extremes, pairs, out)
    assert out.tobytes() == np.array([[-0.0, 0.0], [2.0, 2.0], [-3.0, -3.0]], np.float32).tobytes()


def test_shared_memory_is_garbage_in_every_block(kernels):
    words = np.zeros(4, np.uint32)
    call(kernels.run_fresh_shared, words)
    assert set(words) == {0xCDCDCDCD}


# Mistakes that show in the result


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_a_removed_syncthreads_shows_under_some_seed(kernels, monkeypatch, dropped):
    flags = np.random.default_rng(3).integers(0, 2, 256).astype(np.int32)
    wrong = []
    for seed in ORDERS:
        monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
        wrong.append(run_scan(kernels, flags, dropped) != expected_scan(flags))
    assert any(wrong[1:])


def test_a_removed_syncwarp_shows_under_every_seed(kernels, order):
    values, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    call(kernels.run_reverse_warps, values, out, 1)
    assert np.array_equal(out, values ^ 31)
    call(kernels.run_reverse_warps, values, out, 0)
    assert not np.array_equal(out, values ^ 31)


def test_a_seed_repeats_its_order(kernels, monkeypatch):
    flags = np.ones(256, np.int32)
    runs = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
        runs.append(run_scan(kernels, flags, dropped=3))
    assert runs[0] == runs[1] != runs[2]


# Mistakes that abort

ABORTS = {
    "deadlock at a barrier": (
        "split_barrier",
        [],
        [
            "kernel split_barrier, block (0, 0, 0)",
            "deadlock",
            "not reached by all live threads",
            "__syncthreads at",
            "16 of 32 live threads",
            "__syncwarp at",
            "with mask 0xFFFFFFFF",
        ],
    ),
    "two different barriers": (
        "two_barriers",
        [],
        ["thread 32 is in the __syncthreads at", "while others wait"],
    ),
    "overrun of shared memory": (
        "write_shared",
        [32],
        ["kernel write_shared, block (1, 0, 0)", "shared memory overrun", "byte 128 of 128"],
    ),
    "overrun by far": ("write_shared", [95], ["shared memory overrun", "byte 380 of 128"]),
    "underrun of shared memory": ("write_shared", [-1], ["shared memory underrun"]),
    "shuffle with an exited lane": (
        "shuffle_after_exit",
        [32],
        ["__shfl_xor_sync at", "names lane 7, which has exited"],
    ),
    "shuffle with a missing lane": (
        "shuffle_after_exit",
        [20],
        ["names lane 20, which does not exist"],
    ),
    "vote without its own lane": (
        "vote_without_own_lane",
        [],
        ["__any_sync at", "omits the calling lane 0"],
    ),
    "shuffle never joined": (
        "shuffle_never_joined",
        [],
        ["deadlock", "__shfl_down_sync at", "31 of 32 live threads", "the first is thread 3"],
    ),
    "too many threads": ("nothing", [1, 1025, 0], ["bad launch of kernel nothing", "1024 threads"]),
    "no threads": ("nothing", [1, 0, 0], ["1024 threads"]),
    "no blocks": ("nothing", [0, 32, 0], ["a grid has 1..2147483647"]),
    "a negative grid": ("nothing", [-1, 32, 0], ["a grid has 1..2147483647"]),
    "too much shared memory": ("nothing", [1, 32, 227 * 1024 + 1], ["at most 227 KiB"]),
}


def run_failure(
    library: Path, kernel: str, arguments: list[int], seed: str = ""
) -> subprocess.CompletedProcess:
    script = (
        "import ctypes, sys; getattr(ctypes.CDLL(sys.argv[1]), 'launch_' + "
        "sys.argv[2])(*map(int, sys.argv[3:]))"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", script, str(library), kernel, *map(str, arguments)],
        text=True,
        env={**os.environ, "CUDA_ON_CPU_SEED": seed},
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("mistake", ABORTS)
def test_a_mistake_aborts_with_a_sentence(failures, mistake):
    kernel, arguments, parts = ABORTS[mistake]
    result = run_failure(failures, kernel, arguments)
    assert result.returncode == -signal.SIGABRT, (result.returncode, result.stderr)
    assert not [part for part in parts if part not in result.stderr], result.stderr


def test_a_deadlock_aborts_under_a_seed(failures):
    result = run_failure(failures, "split_barrier", [], seed="1")
    assert result.returncode == -signal.SIGABRT and "deadlock" in result.stderr


def test_a_seed_that_is_no_number_aborts(failures):
    result = run_failure(failures, "nothing", [1, 32, 0], seed="one")
    assert (
        result.returncode == -signal.SIGABRT
        and "CUDA_ON_CPU_SEED is not a number: one" in result.stderr
    )


def test_a_stack_overflow_faults_and_less_does_not(failures):
    assert run_failure(failures, "overflow_stack", [2]).returncode == 0
    assert run_failure(failures, "overflow_stack", [4]).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("__global__ void k(float* x) { atomicAdd(x, 1.0f); }", "float atomics are banned"),
        (
            "__global__ void k(long* x) { atomicAdd(x, 1); }",
            "int, unsigned and unsigned long long only",
        ),
        (
            "__global__ void k(float* x) { __shared__ float s[4]; *x = s[0]; }",
            "shared memory comes from DYNAMIC_SHARED",
        ),
        ("__device__ int f(int a, long b) { return min(a, b); }", "ambiguous"),
    ],
    ids=["float atomic", "long atomic", "static shared memory", "min of int and long"],
)
def test_what_the_project_bans_or_nvcc_refuses_does_not_compile(tmp_path, code, sentence):
    (tmp_path / "kernel.cu").write_text(f'#include "cuda_compat.h"\n{code}\n')
    result = subprocess.run(
        [*GXX, "-fsyntax-only", str(tmp_path / "kernel.cu")], capture_output=True, text=True
    )
    assert result.returncode != 0 and sentence in result.stderr, result.stderr


# The other compiler


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", [KERNELS, FAILURES], ids=["kernels", "failures"])
def test_the_same_source_compiles_for_the_gpu(tmp_path, source):
    (tmp_path / "kernels.cu").write_text(source)
    subprocess.run(
        [
            "nvcc",
            "-arch=sm_90",
            "-std=c++17",
            "-fmad=false",
            f"-I{CSRC}",
            "-c",
            str(tmp_path / "kernels.cu"),
            "-o",
            str(tmp_path / "kernels.o"),
        ],
        check=True,
    )
