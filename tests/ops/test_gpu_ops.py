"""What only a CUDA device runs: the grouped GEMM, permutations without atomics, variable-length
attention, the router.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.attention.base import SequenceLayout, has_varlen_kernel
from model.attention.dense import DenseAttention
from model.config import ModelConfig
from model.layers import rotary_tables
from ops.grouped_mlp import grouped_mlp, reference_grouped_mlp, select_backend
from ops.permute import group_by_expert, permute, unpermute
from ops.permute.reference import reference_permute, reference_unpermute
from ops.router import RouterOutput, RouteSpec, route
from ops.router import select_backend as select_router
from ops.router.reference import score
from ops.testing import (
    EDGE_CASES,
    MODEL_SHAPES,
    MoEShape,
    assert_close,
    count_rows,
    draw_expert_ids,
    poisoned_memory,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = torch.bfloat16
# Edge cases with small experts, and the experts of a real model under a prime number of tokens.
SHAPES = {
    name: (MoEShape(tokens, 128, 64, experts, top_k), load)
    for name, (tokens, experts, top_k, load) in EDGE_CASES.items()
}
SHAPES |= {
    f"olmoe_{load}": (dataclasses.replace(MODEL_SHAPES["olmoe-1b-7b"], num_tokens=1021), load)
    for load in ("even", "skewed", "half")
}


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def normal(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()


def run(
    function, inputs: tuple[torch.Tensor, ...], *arguments, **options
) -> tuple[torch.Tensor, ...]:
    """Output and all gradients under a fixed random gradient."""
    out = function(*inputs, *arguments, **options)
    grad = normal(*out.shape, seed=9).detach().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def fp32(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().float().requires_grad_() for t in tensors)


def expert_case(
    shape: MoEShape, load: str
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """hidden, weights, gate_up, down with gradient; slots, inverse, offsets."""
    ids = draw_expert_ids(shape.num_tokens, shape.num_experts, shape.top_k, load)
    width, hidden_size = shape.expert_intermediate_size, shape.hidden_size
    with torch.no_grad():
        gate_up = normal(shape.num_experts, 2 * width, hidden_size, seed=1) * hidden_size**-0.5
        down = normal(shape.num_experts, hidden_size, width, seed=2) * width**-0.5
    inputs = (
        normal(shape.num_tokens, hidden_size, seed=0),
        normal(*ids.shape, seed=3, dtype=torch.float32),
        gate_up.requires_grad_(),
        down.requires_grad_(),
    )
    return inputs, group_by_expert(ids.cuda(), shape.num_experts)


@pytest.mark.parametrize("case", SHAPES)
def test_grouped_mm_and_its_gradients_match_the_reference(case, poisoned):
    inputs, places = expert_case(*SHAPES[case])
    expected = run(reference_grouped_mlp, fp32(inputs), *places)
    ours = run(grouped_mlp, inputs, *places, backend="grouped_mm")
    for name, value, reference in zip(
        ("out", "grad hidden", "grad weights", "grad gate_up", "grad down"),
        ours,
        expected,
        strict=True,
    ):
        assert_close(name, value, reference, BF16)
    idle = places[2].diff() == 0
    for name, grad in zip(("gate_up", "down"), ours[3:], strict=True):
        assert grad[idle].count_nonzero() == 0, f"experts without rows have a gradient in {name}"


def test_auto_takes_our_kernels_where_the_device_runs_them():
    assert select_backend("auto", torch.device("cuda"), BF16, 2048, 1024) == "triton"


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_experts_never_wait_for_the_host_and_run_inside_a_graph(backend):
    inputs, places = expert_case(*SHAPES["olmoe_skewed"])
    inputs = tuple(t.detach() for t in inputs)
    expected = grouped_mlp(*inputs, *places, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_mlp(*inputs, *places, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_mlp(*inputs, *places, backend=backend)
    other = group_by_expert(draw_expert_ids(1021, 64, 8, "even", seed=5).cuda(), 64)
    for kept, new in zip(places, other, strict=True):
        kept.copy_(new)
    graph.replay()
    assert torch.equal(out, grouped_mlp(*inputs, *other, backend=backend)) and not torch.equal(
        out, expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("case", EDGE_CASES)
def test_permutations_and_their_gradients_match_the_reference(case, dtype, poisoned):
    num_tokens, num_experts, top_k, load = EDGE_CASES[case]
    ids = draw_expert_ids(num_tokens, num_experts, top_k, load).cuda()
    slots, inverse, offsets = group_by_expert(ids, num_experts)
    used = int(offsets[-1])
    assert torch.equal(offsets.diff(), count_rows(ids, num_experts))
    tokens, rows = normal(num_tokens, 8, seed=0, dtype=dtype), normal(used, 8, seed=1, dtype=dtype)
    if used == 0:  # the reference then depends on nothing
        assert unpermute(rows, slots[:0], inverse).count_nonzero() == 0
        return
    ones = torch.ones(ids.shape, device="cuda")
    pairs = [
        (
            run(lambda t: permute(t, slots[:used], inverse), (tokens,)),
            run(lambda t: reference_permute(t, ids, num_experts), fp32((tokens,))),
        ),
        (
            run(lambda r: unpermute(r, slots[:used], inverse), (rows,)),
            run(lambda r: reference_unpermute(r, ids, ones), fp32((rows,))),
        ),
    ]
    for op, (ours, expected) in zip(("permute", "unpermute"), pairs, strict=True):
        for name, value, reference in zip(("out", "grad"), ours, expected, strict=True):
            assert_close(f"{op} {name}", value, reference, dtype)


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_repeats_of_a_routed_layer_are_bit_identical(backend):
    """Without torch's deterministic mode: the ops themselves must not use float atomics."""
    shape = dataclasses.replace(MODEL_SHAPES["olmoe-1b-7b"], num_tokens=4096)
    inputs, places = expert_case(shape, "skewed")
    first = run(grouped_mlp, inputs, *places, backend=backend)
    for _ in range(3):
        again = run(grouped_mlp, inputs, *places, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 64), (2, 64), (1, 128)])
@pytest.mark.parametrize(
    "documents", [[[64, 64]], [[1, 126, 1], [128]], [[37, 53, 38], [127, 1], [2, 126]]], ids=str
)
def test_varlen_attention_matches_masked_attention_in_fp32(
    documents, num_kv_heads, head_dim, poisoned
):
    config = ModelConfig(
        vocab_size=8,
        hidden_size=256,
        num_layers=1,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        intermediate_size=8,
        num_experts=0,
        expert_intermediate_size=8,
        max_seq_len=128,
        head_dim=head_dim,
        qk_norm="head",
    )
    torch.manual_seed(0)
    ours = DenseAttention(config).cuda().to(BF16)
    exact = DenseAttention(config).cuda()
    exact.load_state_dict(ours.state_dict())
    lengths = torch.tensor([length for row in documents for length in row])
    positions = (
        torch.cat([torch.arange(length) for length in lengths.tolist()])
        .view(len(documents), -1)
        .cuda()
    )
    cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).to("cuda", torch.int32)
    cos, sin = rotary_tables(positions, head_dim, config.rope_theta)
    masked = SequenceLayout(cos, sin, cu_seqlens, int(lengths.max()), positions)
    hidden = normal(*positions.shape, config.hidden_size, seed=1)
    assert has_varlen_kernel(hidden.device, BF16) and not has_varlen_kernel(
        hidden.device, torch.float32
    )

    def results(attention, hidden, layout):
        inputs = (hidden, *attention.parameters())
        out, _ = attention(hidden, layout)
        grad = normal(*out.shape, seed=2).detach().to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    names = ("out", "grad hidden", *(f"grad {name}" for name, _ in ours.named_parameters()))
    for name, value, reference in zip(
        names,
        results(ours, hidden, dataclasses.replace(masked, mask=None)),
        results(exact, *fp32((hidden,)), masked),
        strict=True,
    ):
        assert_close(name, value, reference, BF16)


# The router: the same arithmetic as on the CPU, to the bit (ops/router/README.md), so equality is
# the only tolerance.

ROUTERS = {
    "top_k": {"top_k": 4},
    "biased_groups": {
        "top_k": 4,
        "score_function": "sigmoid",
        "num_groups": 4,
        "top_groups": 2,
        "scaling_factor": 2.5,
    },
    "null_experts": {"top_k": 4, "num_null_experts": 3, "skip_nonfinite": True},
    "top_p": {"mode": "top_p"},
    "threshold": {"mode": "threshold", "score_function": "sigmoid", "normalize_weights": False},
    "threshold_sqrt_softplus": {
        "mode": "threshold",
        "score_function": "sqrt_softplus",
        "min_experts": 0,
    },
    "relu": {"mode": "relu", "score_function": "relu", "normalize_weights": False},
    "expert_choice": {"mode": "expert_choice", "top_k": 3},
    "given": {"mode": "given", "score_function": "sqrt_softplus"},
}
ROUTER_EXPERTS = [8, 64, 128, 256, 300, 1024]
"""Every width of the kernels, full and with a rest."""


def router_spec(name: str, num_experts: int) -> RouteSpec:
    return RouteSpec(
        num_experts - ROUTERS[name].get("num_null_experts", 0),
        **{"max_experts": 6, **ROUTERS[name]},
    )


def drawn_for_router(
    name: str, spec: RouteSpec, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict]:
    """Logits with ties and rows that are not finite, and every optional argument, on the CPU."""
    generator = torch.Generator().manual_seed(num_tokens + spec.num_experts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    logits = draw(num_tokens, spec.num_columns).mul_(1.5).to(dtype)
    logits[3:4] = 0.25
    logits[5:6, -1], logits[7:8, 0], logits[11:12, 1] = torch.nan, torch.inf, -torch.inf
    # about so many are above
    three_experts = 1.5 * torch.special.ndtri(torch.tensor([1 - 3 / spec.num_experts]))
    value = 0.4 if spec.mode == "top_p" else float(score(three_experts, spec.score_function))
    num_segments = next(n for n in (241, 13, 1) if num_tokens % n == 0)
    arguments = {
        "token_mask": draw(num_tokens) > -1.0,
        "token_ids": torch.arange(num_tokens) * 7919 + 2**40,
        "num_bins": 24,
        "histogram_range": torch.stack(
            (-0.6 + 0.1 * draw(spec.num_experts), 20 + draw(spec.num_experts)), dim=1
        ),
        "router_inputs": torch.tensor([value, 1.0, 2.0, 5.0]),
        "num_segments": num_segments,
    }
    if spec.mode != "expert_choice":
        arguments["bias"] = 0.05 * draw(spec.num_columns)
    if spec.mode == "given":
        ids = draw(num_tokens, spec.num_experts).argsort(dim=1)[:, : spec.max_experts]
        arguments["given_ids"] = ids.masked_fill(draw(*ids.shape) < -0.5, -1)
    return logits, arguments


def on_cuda(arguments: dict) -> dict:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def run_router(
    logits: torch.Tensor, spec: RouteSpec, arguments: dict
) -> tuple[RouterOutput, torch.Tensor]:
    """Output, and the gradient of the logits under fixed random gradients of all that has one."""
    logits = logits.detach().requires_grad_()
    out = route(logits, spec, backend="fused", **arguments)
    outputs, generator = (
        (out.weights, out.score_sums, out.z_sum, out.entropy_sum),
        torch.Generator().manual_seed(9),
    )
    grads = [torch.randn(t.shape, generator=generator).to(t.device) for t in outputs]
    return out, torch.autograd.grad(outputs, logits, grads)[0]


def assert_same_bits(
    ours: tuple[RouterOutput, torch.Tensor], expected: tuple[RouterOutput, torch.Tensor]
) -> None:
    names = (*RouterOutput._fields, "gradient")
    for name, a, b in zip(names, (*ours[0], ours[1]), (*expected[0], expected[1]), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), f"{name} differs"


@pytest.fixture
def fused_router():
    for device in ("cpu", "cuda"):
        if select_router(torch.device(device), torch.float32) != "fused":
            pytest.skip(f"no compiler for the router on {device}")


@pytest.mark.parametrize("num_experts", ROUTER_EXPERTS)
@pytest.mark.parametrize("name", ROUTERS)
def test_router_equals_the_cpu_router_bit_for_bit(name, num_experts, fused_router, poisoned):
    spec = router_spec(name, num_experts)
    for num_tokens in (1, 13, 4097):
        for dtype in (torch.float32, BF16):
            logits, arguments = drawn_for_router(name, spec, num_tokens, dtype)
            for case in (
                arguments,
                {
                    "router_inputs": arguments["router_inputs"],
                    "given_ids": arguments.get("given_ids"),
                },
            ):
                assert_same_bits(
                    run_router(logits.cuda(), spec, on_cuda(case)), run_router(logits, spec, case)
                )


@pytest.mark.parametrize("name", ROUTERS)
def test_router_between_its_mode_and_plain_top_k_equals_the_cpu_router(name, fused_router):
    spec = router_spec(name, 64)
    logits, arguments = drawn_for_router(name, spec, 1021, torch.float32)
    for share in (0.0, 0.5):
        arguments["router_inputs"][1] = share
        assert_same_bits(
            run_router(logits.cuda(), spec, on_cuda(arguments)), run_router(logits, spec, arguments)
        )


@pytest.mark.parametrize("name", ROUTERS)
def test_router_repeats_are_bit_identical_and_never_wait_for_the_host(name, fused_router):
    spec = router_spec(name, 128)
    # more than one round of a block's tiles
    logits, arguments = drawn_for_router(name, spec, 16388, torch.float32)
    expected = run_router(logits, spec, arguments)
    logits, arguments = logits.cuda(), on_cuda(arguments)
    first = run_router(logits, spec, arguments)
    assert_same_bits(first, expected)
    grads = [torch.ones_like(t) for t in (first[0].weights, first[0].score_sums, first[0].z_sum)]
    for _ in range(3):
        assert_same_bits(run_router(logits, spec, arguments), first)
    logits.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = route(logits, spec, backend="fused", **arguments)
        torch.autograd.grad((out.weights, out.score_sums, out.z_sum), logits, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_router_runs_on_the_callers_stream_and_inside_a_graph(fused_router):
    spec = router_spec("top_k", 64)
    source, arguments = drawn_for_router("top_k", spec, 4097, torch.float32)
    arguments = on_cuda(arguments)
    expected = route(source.cuda(), spec, backend="fused", **arguments)
    logits, stream = torch.zeros_like(source, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits.copy_(source)
        late = route(logits, spec, backend="fused", **arguments)
    torch.cuda.current_stream().wait_stream(stream)
    logits.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = route(logits, spec, backend="fused", **arguments)
    logits.copy_(source)
    graph.replay()
    for name, a, b, c in zip(RouterOutput._fields, late, replayed, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c), f"{name} differs"


@pytest.mark.parametrize("name", ROUTERS)
def test_router_takes_no_tokens(name, fused_router):
    spec = router_spec(name, 64)
    logits, arguments = drawn_for_router(name, spec, 0, torch.float32)
    ours, expected = (
        run_router(logits.cuda(), spec, on_cuda(arguments)),
        run_router(logits, spec, arguments),
    )
    assert_same_bits(ours, expected)
    assert all(t.device.type == "cuda" for t in ours[0])
