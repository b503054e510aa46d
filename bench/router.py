"""The router (logits -> experts, gates, statistics, permutation) against chains of torch calls that
yield the same record.

Legend: T tokens, D hidden, E experts, K slots, B histogram bins.

Least traffic in bytes, of fp32 logits:
    forward: read logits 4*T*E; write gates, ids, slots, inverse 16*T*K; log_z, margin, entropy,
        reasons 13*T; counts, score sums, offsets 16*E; the histogram 4*E*B.
    backward: read logits 4*T*E, ids and gate gradients 8*T*K, log_z, entropy, reasons 9*T,
        gradients of the sums 4*E; write the gradient 4*T*E.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Row, device_name, main, make_row, measure, profile
from ops.device import memory_bandwidth_tbs
from ops.router import Reason, RouterOutput, RouteSpec, route, select_backend
from ops.testing import TOLERANCE, assert_close

Call = Callable[[], object]
CUDA_SHAPES = [
    (8192, 2048, 64, 8),
    (8192, 2048, 128, 8),
    (32768, 4096, 128, 8),
    (32768, 4096, 256, 16),
    (8192, 7168, 896, 16),
]  # T, D, E, K
THRESHOLD = 0.88  # 6 of 64 experts, 12 of 128


# The rivals: "eager" as one writes it, "tuned" with two tricks more. Both leave out what ours does
# besides: rows that are not finite, masks, segments, the checksum, bias, controls in top_k, and
# what is constant there (reasons, numbers of experts). Ids stay int64 where torch makes them so.
# Without a loss on it, entropy is outside their autograd graph.


def chain_top_k(
    logits: Tensor,
    spec: RouteSpec,
    histogram_range: Tensor,
    num_bins: int,
    router_inputs: Tensor,
    tuned: bool,
) -> RouterOutput:
    k = spec.top_k
    scores = logits.softmax(-1)
    with torch.no_grad():
        # one more, for the margin and the threshold of the histogram
        top, top_ids = scores.topk(k + 1, dim=-1)
        ids, margin, alpha = top_ids[:, :k], top[:, k - 1] - top[:, k], top[:, k:]
    chosen = scores.gather(1, ids)
    weights = chosen / chosen.sum(-1, keepdim=True)
    # the logit of the first expert minus the logarithm of its score: no further pass in either
    # direction
    if tuned:
        log_z = (logits.gather(1, ids[:, :1]) - chosen[:, :1].log()).squeeze(1)
    else:
        log_z = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = log_z - torch.linalg.vecdot(scores, logits)
        slots, inverse, offsets = chain_place(ids, spec.num_experts, tuned)
        histogram = chain_histogram(scores, alpha, histogram_range, num_bins)
    constant = log_z.new_empty(0)
    return RouterOutput(
        weights,
        ids,
        offsets.diff().unsqueeze(0),
        scores.sum(0, keepdim=True),
        torch.dot(log_z, log_z),
        entropy.sum(),
        log_z,
        margin,
        entropy,
        constant,
        slots,
        inverse,
        offsets,
        histogram,
        constant,
        constant,
        constant,
        constant,
        constant,
    )


def chain_threshold(
    logits: Tensor,
    spec: RouteSpec,
    histogram_range: Tensor,
    num_bins: int,
    router_inputs: Tensor,
    tuned: bool,
) -> RouterOutput:
    """Sigmoid scores above router_inputs[0], at least one, at most K."""
    k = spec.max_experts
    scores = logits.sigmoid()
    with torch.no_grad():
        top, top_ids = scores.topk(k + 1, dim=-1)
        by_mode = (scores > router_inputs[0]).sum(-1, keepdim=True)
        n = by_mode.clamp(1, k)
        used = torch.arange(k, device=logits.device) < n
        ids = top_ids[:, :k]
        margin = (top.gather(1, n - 1) - top.gather(1, n)).squeeze(1)
        empty, capped = by_mode.squeeze(1) == 0, by_mode.squeeze(1) > k
        reasons = empty * int(Reason.EMPTY) + capped * int(Reason.CAPPED)
        reason_counts = torch.stack((empty.sum(), capped.sum()))
        k_histogram = torch.zeros(k + 1, dtype=torch.int64, device=logits.device)
        k_histogram.scatter_add_(0, n.squeeze(1), torch.ones_like(k_histogram[:1]).expand(len(n)))
    chosen = scores.gather(1, ids) * used
    weights = chosen / chosen.sum(-1, keepdim=True)
    score_sums = scores.sum(-1).reciprocal().unsqueeze(0) @ scores
    log_z = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = log_z - torch.linalg.vecdot(logits.softmax(-1), logits)
        ids = ids.masked_fill(~used, spec.num_experts)
        slots, inverse, offsets = chain_place(ids, spec.num_experts, tuned)
        histogram = chain_histogram(scores, 0.0, histogram_range, num_bins)
    constant = log_z.new_empty(0)
    return RouterOutput(
        weights,
        ids,
        offsets.diff().unsqueeze(0),
        score_sums,
        torch.dot(log_z, log_z),
        entropy.sum(),
        log_z,
        margin,
        entropy,
        reasons,
        slots,
        inverse,
        offsets,
        histogram,
        k_histogram,
        reason_counts,
        constant,
        constant,
        constant,
    )


def chain_place(ids: Tensor, num_experts: int, tuned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order by expert (num_experts: unused), its inverse, first rows. The offsets are in the
    sorted keys, so nothing needs bincount, which would wait for a GPU. Narrow keys take torch's
    radix sort fewer passes.
    """
    keys = ids.flatten()
    if tuned:
        keys = keys.to(torch.uint8 if num_experts < 255 else torch.int16)
    keys, slots = keys.sort(stable=True)
    offsets = torch.searchsorted(
        keys, torch.arange(num_experts + 1, dtype=keys.dtype, device=ids.device)
    )
    inverse = torch.empty_like(slots).scatter_(
        0, slots, torch.arange(len(slots), device=ids.device)
    )
    return slots, inverse.view_as(ids), offsets


def chain_histogram(
    scores: Tensor, alpha: Tensor | float, histogram_range: Tensor, num_bins: int
) -> Tensor:
    num_experts = scores.shape[1]
    counts = torch.zeros(num_experts * num_bins, dtype=torch.int32, device=scores.device)
    if num_bins:
        places = (
            (scores - alpha)
            .sub_(histogram_range[:, 0])
            .mul_(histogram_range[:, 1])
            .clamp_(0, num_bins - 1)
            .long()
        )
        places += num_bins * torch.arange(num_experts, device=scores.device)
        counts.scatter_add_(0, places.flatten(), torch.ones_like(counts[:1]).expand(places.numel()))
    return counts.view(num_experts, num_bins)


def check(ours: RouterOutput, chain: RouterOutput, spec: RouteSpec) -> None:
    """The same record, up to rounding of the floats: which can move a score into the next bin."""
    num_rows = int(ours.offsets[-1])
    used = ours.expert_ids >= 0
    for name in ("expert_ids", "inverse"):
        assert torch.equal(getattr(ours, name)[used].long(), getattr(chain, name)[used]), name
    assert torch.equal(ours.slots[:num_rows].long(), chain.slots[:num_rows]), "slots"
    for name in (
        "counts",
        "offsets",
        *(("reasons", "k_histogram") if spec.mode == "threshold" else ()),
    ):
        assert torch.equal(getattr(ours, name).long(), getattr(chain, name)), name
    if spec.mode == "threshold":
        assert ours.reason_counts[[1, 3]].tolist() == chain.reason_counts.tolist(), "reason_counts"
    for name in ("weights", "score_sums", "z_sum", "entropy_sum", "log_z", "entropy"):
        assert_close(name, getattr(ours, name), getattr(chain, name))
    # a difference of scores, which are at most 1
    off = float((ours.margin - chain.margin).abs().max())
    assert off <= TOLERANCE[torch.float32], f"margin is off by {off:.3g}"
    moved = (ours.histogram - chain.histogram).abs().sum()
    assert moved <= 1e-3 * chain.histogram.sum(), f"the histograms differ in {int(moved)} places"


def draw_logits(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """Logits of a trained router's spread, without near-ties, whose order is nobody's to define:
    every row holds the same quantiles of a normal distribution, in its own order and stretched by
    its own factor.
    """
    generator = torch.Generator(device).manual_seed(0)
    values = torch.special.ndtri((torch.arange(num_experts, device=device) + 0.5) / num_experts)
    order = torch.rand(num_tokens, num_experts, generator=generator, device=device).argsort(-1)
    return (
        values[order] * (1 + torch.rand(num_tokens, 1, generator=generator, device=device))
    ).requires_grad_()


def graphed(function: Call) -> Call:
    """The same work as one CUDA graph: the device's time without that of the launches. Fails if it
    waits for the host.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def waits_for_host(function: Call) -> str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return "yes"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def bench_shape(
    device: torch.device,
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    num_bins: int,
    mode: str,
    repeats: int,
) -> list[Row]:
    threshold = mode == "threshold"
    spec = RouteSpec(
        num_experts,
        mode="threshold" if threshold else "top_k",
        top_k=top_k,
        max_experts=top_k,
        score_function="sigmoid" if threshold else "softmax",
    )
    chain = chain_threshold if threshold else chain_top_k
    histogram_range = torch.tensor([[-0.5, max(1, num_bins)]], device=device).repeat(num_experts, 1)
    router_inputs = torch.tensor([THRESHOLD, 1.0, 0.0, top_k], device=device)
    logits = draw_logits(num_tokens, num_experts, device)

    def ours(logits: Tensor) -> RouterOutput:
        return route(
            logits,
            spec,
            router_inputs=router_inputs if threshold else None,
            num_bins=num_bins,
            histogram_range=histogram_range if num_bins else None,
        )

    functions = {"ours": ours} | {
        name: functools.partial(
            chain,
            spec=spec,
            histogram_range=histogram_range,
            num_bins=num_bins,
            router_inputs=router_inputs,
            tuned=name == "tuned",
        )
        for name in ("eager", "tuned")
    }

    def losses(out: RouterOutput) -> tuple[Tensor, Tensor, Tensor]:
        return out.weights, out.score_sums, out.z_sum

    outputs = {name: function(logits) for name, function in functions.items()}
    generator = torch.Generator(device).manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, device=device) for t in losses(outputs["ours"])
    ]
    grads[0] = grads[0] * (outputs["ours"].weights > 0)
    (expected,) = torch.autograd.grad(losses(outputs["ours"]), logits, grads)
    for name in ("eager", "tuned"):
        check(outputs["ours"], outputs[name], spec)
        assert_close(
            f"gradient of {name}",
            *torch.autograd.grad(losses(outputs[name]), logits, grads),
            expected,
        )
    del outputs, expected

    def forward(function: Callable[[Tensor], RouterOutput]) -> None:
        with torch.no_grad():
            function(logits)

    def forward_backward(function: Callable[[Tensor], RouterOutput]) -> None:
        torch.autograd.grad(losses(function(logits)), logits, grads)

    backend = select_backend(device, torch.float32)
    label: dict[str, int | str] = {
        "mode": mode,
        "T": num_tokens,
        "E": num_experts,
        "K": top_k,
        "B": num_bins,
    }
    row_bytes = num_tokens * num_experts * 4
    read_write = (
        row_bytes
        + 16 * num_tokens * top_k
        + 13 * num_tokens
        + 16 * num_experts
        + 4 * num_experts * num_bins
    )
    backward_bytes = 2 * row_bytes + 8 * num_tokens * top_k + 9 * num_tokens + 4 * num_experts
    found = []
    for name, call, num_bytes in (
        ("forward", forward, read_write),
        ("forward_backward", forward_backward, read_write + backward_bytes),
    ):
        calls: dict[str, Call] = {n: functools.partial(call, f) for n, f in functions.items()}
        found.append(
            make_row(
                f"router.{name}",
                label,
                torch.float32,
                device,
                measure(calls, device, repeats),
                None,
                backend=backend,
                threads=torch.get_num_threads() if device.type == "cpu" else None,
            )
        )
        if device.type == "cuda":
            times = measure({n: graphed(c) for n, c in calls.items()}, device, repeats)
            bandwidth = memory_bandwidth_tbs(device_name(device))
            gb_s = num_bytes / times["ours"] / 1e6
            found.append(
                make_row(
                    f"router.{name}.graph",
                    label,
                    torch.float32,
                    device,
                    times,
                    None,
                    backend=backend,
                    mb=round(num_bytes / 1e6, 2),
                    gb_s=round(gb_s, 1),
                    bandwidth_share=None if bandwidth is None else round(gb_s / 1e3 / bandwidth, 4),
                    **{f"{n}_launches": len(profile(c)[1]) for n, c in calls.items()},
                    **{f"{n}_waits_for_host": waits_for_host(c) for n, c in calls.items()},
                )
            )
    if device.type == "cuda":
        found += bench_with_gemm(device, hidden_size, label, functions, losses, grads, repeats)
    return found


def bench_with_gemm(
    device: torch.device,
    hidden_size: int,
    label: dict[str, int | str],
    functions: dict[str, Callable[[Tensor], RouterOutput]],
    losses: Callable[[RouterOutput], tuple[Tensor, ...]],
    grads: list[Tensor],
    repeats: int,
) -> list[Row]:
    """From bf16 hidden states, the logits in fp32 as the model computes them."""
    generator = torch.Generator(device).manual_seed(2)
    hidden = torch.randn(
        int(label["T"]), hidden_size, generator=generator, device=device, dtype=torch.bfloat16
    )
    weight = torch.randn(int(label["E"]), hidden_size, generator=generator, device=device).mul_(
        hidden_size**-0.5
    )
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def forward(function: Callable[[Tensor], RouterOutput]) -> None:
        with torch.no_grad():
            function(F.linear(hidden.float(), weight))

    def forward_backward(function: Callable[[Tensor], RouterOutput]) -> None:
        torch.autograd.grad(losses(function(F.linear(hidden.float(), weight))), inputs, grads)

    found = []
    for name, call in (("forward", forward), ("forward_backward", forward_backward)):
        times = measure(
            {n: functools.partial(call, f) for n, f in functions.items()}, device, repeats
        )
        found.append(
            make_row(
                f"router.with_gemm.{name}",
                {**label, "D": hidden_size},
                torch.float32,
                device,
                times,
                None,
            )
        )
    return found


def run(device: torch.device) -> list[Row]:
    if device.type == "cuda":
        cases = [(*shape, 0, "top_k") for shape in CUDA_SHAPES]
        cases += [(8192, 2048, 128, 8, 256, "top_k"), (8192, 2048, 128, 16, 256, "threshold")]
        repeats = 15
    else:
        torch.set_num_threads(1)  # the ranks of a CPU run share the cores
        cases = [
            (8192, 0, 64, 8, 0, "top_k"),
            (8192, 0, 64, 8, 256, "top_k"),
            (8192, 0, 128, 8, 0, "top_k"),
            (8192, 0, 64, 16, 0, "threshold"),
        ]
        repeats = 31
    return [row for case in cases for row in bench_shape(device, *case, repeats)]


if __name__ == "__main__":
    main("router", run)
