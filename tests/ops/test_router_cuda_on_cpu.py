"""The router's CUDA kernels, the unmodified router.cu run on the CPU, equal the C++ op bit for bit;
and broken kernels show.

As a script, with paths of libraries: prints for each whether its kernels compute what the C++ op
computes (see judge).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ops.compile.cuda import Resources, build_cuda_on_cpu, resources
from ops.router import RouterOutput, RouteSpec, interface, route
from ops.router.spec import Mode, ScoreFunction
from ops.testing import poisoned_memory
from tests.pairwise import some_daily

ROOT = Path(__file__).resolve().parents[2]
MODES, SCORES = get_args(Mode), get_args(ScoreFunction)
ORDERS = ("", "1", "2", "3")
"""Values of CUDA_ON_CPU_SEED; the empty one is the fixed order."""

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or platform.machine() != "x86_64",
    reason="cuda_on_cpu.h needs g++ and an x86-64 processor",
)


def use_launchers(library: Path | str) -> None:
    torch.ops.loadstone.router_use_launchers(str(library), True)


@pytest.fixture(scope="module")
def kernels() -> Path:
    interface.load_library()
    return build_cuda_on_cpu("router_cuda_on_cpu", [interface.SOURCES / "router.cu"])


@pytest.fixture(autouse=True)
def _kernels_are_put_away():
    interface.load_library()
    yield
    use_launchers("")


def draw(
    spec: RouteSpec,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_segments: int = 1,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits with a tie, a row that is not finite and masked rows, and all other arguments of
    route.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(num_tokens, spec.num_columns, generator=generator)).to(dtype)
    if num_tokens > 7:
        logits[5, -1], logits[7] = torch.nan, 0.0
    # Controls that give about six columns a token, some many more and some none.
    columns = min(6, spec.num_columns)
    scores = interface.reference_route(
        logits.float().nan_to_num(),
        replace(
            spec,
            mode="top_k",
            num_groups=1,
            top_groups=1,
            top_k=columns,
            max_experts=columns,
            min_experts=0,
            num_null_experts=0,
            num_experts=spec.num_columns,
            normalize_weights=False,
            scaling_factor=1.0,
        ),
    ).weights
    value = (
        float(scores.sum(1).mean() / spec.num_columns**0.5)
        if spec.mode == "top_p"
        else float(scores[:, -1].median())
    )
    arguments: dict[str, Any] = {
        "router_inputs": torch.tensor([value, 1.0, 2.0, spec.max_experts]),
        "token_mask": torch.rand(num_tokens, generator=generator) > 0.2,
        "token_ids": torch.arange(num_tokens) * 13 + 100,
        "num_segments": num_segments,
        "histogram_range": torch.tensor([[-0.5, 20.0]]).repeat(spec.num_experts, 1),
        "num_bins": 40,
    }
    if spec.mode != "expert_choice":
        arguments["bias"] = 0.01 * torch.randn(spec.num_columns, generator=generator)
    if spec.mode == "given":
        ids = torch.rand(num_tokens, spec.num_experts, generator=generator).argsort(1)
        unused = torch.rand(num_tokens, spec.max_experts, generator=generator) < 0.3
        arguments["given_ids"] = ids[:, : spec.max_experts].masked_fill(unused, -1)
    return logits, arguments


def run(
    library: Path | str, logits: torch.Tensor, spec: RouteSpec, **arguments: Any
) -> dict[str, torch.Tensor]:
    """All outputs and the gradient, by the kernels of a library or, with "", by the C++ op."""
    use_launchers(library)
    logits = logits.clone().requires_grad_()
    with poisoned_memory():
        out = route(logits, spec, backend="fused", **arguments)
        sums = [out.weights, out.score_sums, out.z_sum, out.entropy_sum]
        generator = torch.Generator().manual_seed(3)
        grad = torch.autograd.grad(
            sums, logits, [torch.randn(t.shape, generator=generator) for t in sums]
        )[0]
    return {
        **{name: t.detach() for name, t in zip(RouterOutput._fields, out, strict=True)},
        "grad logits": grad,
    }


def differences(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, t in expected.items() if not torch.equal(ours[name], t)]


def assert_same_bits(
    kernels: Path,
    logits: torch.Tensor,
    spec: RouteSpec,
    monkeypatch: pytest.MonkeyPatch,
    orders: tuple[str, ...] = ORDERS,
    **arguments: Any,
) -> dict[str, torch.Tensor]:
    expected = run("", logits, spec, **arguments)
    for order in orders:
        monkeypatch.setenv("CUDA_ON_CPU_SEED", order)
        wrong = differences(run(kernels, logits, spec, **arguments), expected)
        assert not wrong, f"{wrong} of {spec} differ, CUDA_ON_CPU_SEED={order!r}"
    return expected


def spec_of(
    mode: Mode, num_experts: int, score_function: ScoreFunction = "softmax", **changes: Any
) -> RouteSpec:
    return RouteSpec(
        num_experts,
        mode,
        "relu" if mode == "relu" else score_function,
        **{"top_k": 4, "max_experts": 8, "scaling_factor": 1.5, **changes},
    )


# The kernels compute what the C++ op computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_experts", some_daily([8, 64, 100, 256, 1024, 300]))
@pytest.mark.parametrize("mode", MODES)
def test_kernels_equal_the_cpu_op_bit_for_bit(kernels, monkeypatch, mode, num_experts, dtype):
    number = MODES.index(mode) + num_experts
    for num_null in (0, 3):
        spec = spec_of(
            mode,
            num_experts,
            SCORES[(number + num_null) % (3 if mode == "top_p" else 4)],
            num_null_experts=num_null,
            normalize_weights=num_null == 0,
            skip_nonfinite=num_null > 0,
        )
        if not spec.problems():
            logits, arguments = draw(spec, 132, dtype, seed=number, num_segments=4)
            assert_same_bits(kernels, logits, spec, monkeypatch, ("", str(number)), **arguments)


@pytest.mark.parametrize(
    "num_tokens, num_experts, num_segments",
    [
        (640, 64, 4),  # 20 blocks, five a segment, in two groups of blocks
        (640, 300, 1),  # the same with two rounds of the prefix sum over experts
        (600, 8, 600),  # a block for every token: 38 groups
        (8300, 8, 2),  # blocks of 64 tokens
    ],
    ids=str,
)
def test_many_blocks_place_tokens_in_order(
    kernels, monkeypatch, num_tokens, num_experts, num_segments
):
    mode: Mode = "top_p" if num_experts == 64 else "top_k"
    logits, arguments = draw(
        spec := spec_of(mode, num_experts, top_k=2), num_tokens, num_segments=num_segments
    )
    expected = assert_same_bits(kernels, logits, spec, monkeypatch, ("", "1", "2"), **arguments)
    assert expected["expert_ids"][-40:].ge(0).any()


@pytest.mark.parametrize(
    "num_experts, changes",
    [
        (8, {"mode": "relu", "max_experts": 8, "min_experts": 8, "top_k": 1}),
        (64, {"mode": "top_p", "max_experts": 64}),
        (100, {"num_groups": 10, "top_groups": 3, "top_k": 6}),
        (100, {"num_groups": 10, "top_groups": 3, "top_k": 6, "group_keys": 7}),
        (256, {"num_groups": 8, "top_groups": 4, "top_k": 8, "max_experts": 8, "group_keys": 1}),
        (300, {"mode": "top_p", "num_groups": 60, "top_groups": 2}),
        (1024, {"mode": "threshold", "max_experts": 64, "min_experts": 40}),
        (1, {"top_k": 1, "max_experts": 1, "normalize_weights": False}),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, int) else "-".join(f"{k}={v}" for k, v in value.items())
    ),
)
def test_wide_selections_and_groups_equal_the_cpu_op(kernels, monkeypatch, num_experts, changes):
    spec = spec_of(**{"mode": "top_k", **changes}, num_experts=num_experts)
    for num_tokens in (1, 45):
        logits, arguments = draw(spec, num_tokens)
        arguments["router_inputs"][0] *= 0.5
        assert_same_bits(kernels, logits, spec, monkeypatch, ("", "1"), **arguments)
        arguments["router_inputs"] = torch.tensor(
            [float(arguments["router_inputs"][0]), 0.4, 3.0, 5.0]
        )
        assert_same_bits(kernels, logits, spec, monkeypatch, ("", "2"), **arguments)


@pytest.mark.parametrize(
    ("score_function", "level"),
    [("softmax", -200.0), ("sigmoid", -60.0), ("sqrt_softplus", -400.0)],
)
@pytest.mark.parametrize("num_experts", [8, 300])
def test_scores_that_underflow_give_the_same_bits(
    kernels, monkeypatch, num_experts, score_function, level
):
    """Every second token's experts lie in the tail of their scores, so that tiles of a warp
    part.
    """
    spec = spec_of("top_k", num_experts, score_function, num_null_experts=3)
    logits, arguments = draw(spec, 132, num_segments=4)
    logits[::2, :num_experts] += level
    arguments["bias"][num_experts:] = -5.0
    out = assert_same_bits(kernels, logits, spec, monkeypatch, ("", "1"), **arguments)
    live = arguments["token_mask"] & logits.isfinite().all(1)
    assert abs(float(out["score_sums"].sum()) - int(live.sum())) < 1e-2


@pytest.mark.parametrize("num_experts", [8, 102, 300])
@pytest.mark.parametrize("mode", ["top_k", "top_p", "threshold"])
def test_tokens_of_several_budgets_give_the_same_bits(kernels, monkeypatch, mode, num_experts):
    """Rows of tables whose width is no multiple of 16 bytes; tiles of a warp take other numbers of
    ranks.
    """
    spec = spec_of(mode, num_experts, num_null_experts=num_experts % 4)
    logits, arguments = draw(spec, 132, num_segments=4)
    del arguments["histogram_range"], arguments["num_bins"]
    bias, (value, *_) = arguments.pop("bias"), arguments["router_inputs"].tolist()
    arguments |= {
        "bias_table": torch.stack([bias, -3 * bias, 5 * bias]),
        "router_inputs": torch.tensor(
            [[value, 1, 2, 8], [value, 0.4, 7, 8], [value * 0.5, 1, 2, 3]]
        ),
        "row_of": (torch.arange(132) * 5 % 7 % 3).int(),
    }
    assert_same_bits(kernels, logits, spec, monkeypatch, ("", "1"), **arguments)


@pytest.mark.parametrize("value", [-float("inf"), float("nan")])
def test_a_bias_that_is_not_finite_selects_the_same_experts(kernels, monkeypatch, value):
    """-inf is what people write to switch an expert off; NaN is what a broken balance controller
    sends.
    """
    for mode in ("top_k", "top_p", "threshold"):
        spec = spec_of(mode, 16, top_k=3, max_experts=3, min_experts=3)
        logits, arguments = draw(spec, 20)
        arguments["bias"][3:] = value
        arguments["bias"][1:2] = value
        expected = assert_same_bits(kernels, logits, spec, monkeypatch, ("",), **arguments)
        ids = expected["expert_ids"]
        assert all(len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in ids)), (
            "an expert twice"
        )


# Broken kernels show: barriers taken out one at a time, and mistakes in the permutation

BARRIER = re.compile(r"__sync(threads|warp)\(\);")
FUNCTION = re.compile(r"\b(?:void|int) (?:__launch_bounds__\([^)]*\) )?(\w+)\(")
MISTAKES = {
    "the prefix sum counts an expert's own rows": (
        "int row = total + inclusive - all;",
        "int row = total + inclusive;",
    ),
    "a block counts its own group of blocks": (
        "if (g < group) before += count;",
        "if (g <= group) before += count;",
    ),
    "a block counts itself": ("b < block; ++b) before", "b <= block; ++b) before"),
    "a segment's last block reaches into the next segment": (
        "return end < segment_end ? end : segment_end;",
        "return end;",
    ),
    "the tail is not filled": ("if (i >= total) a.slots[i] = -1;", ";"),
    "the tail begins a row late": (
        "if (i >= total) a.slots[i] = -1;",
        "if (i > total) a.slots[i] = -1;",
    ),
}
UNSEEN = {
    "lanes.h store_row 1": "the shuffles before it have made all lanes wait; that they do not "
    "order memory, as a GPU may "
    "have it, cannot be shown where threads switch only when they wait",
}
"""Barriers whose absence cannot show here, and why."""


def barriers() -> dict[str, tuple[str, str]]:
    """Name ("file function number") -> file, its text without this barrier."""
    found = {}
    for file in ("router.cu", "lanes.h"):
        text = (interface.SOURCES / file).read_text()
        numbers: dict[str, int] = {}
        for match in BARRIER.finditer(text):
            function = FUNCTION.findall(text[: match.start()])[-1]
            numbers[function] = numbers.get(function, 0) + 1
            found[f"{file} {function} {numbers[function]}"] = (
                file,
                text[: match.start()] + ";" + text[match.end() :],
            )
    return found


def mutants() -> dict[str, tuple[str, str]]:
    """Name -> file, its text."""
    text = (interface.SOURCES / "router.cu").read_text()
    assert all(text.count(old) == 1 for old, _ in MISTAKES.values()), (
        "a mistake no longer finds its place in router.cu"
    )
    return {
        "nothing": ("router.cu", text),
        **barriers(),
        **{name: ("router.cu", text.replace(*change)) for name, change in MISTAKES.items()},
    }


FEWER_WIDTHS = r"""#define DISPATCH(launch, args, device, stream)                          \
  do {                                                                          \
    using namespace loadstone;                                                  \
    if ((args)->spec.num_columns <= 64) launch<float, 8, 8>(*(args), nullptr);  \
    else launch<float, 32, 16>(*(args), nullptr);                               \
    return 0;                                                                   \
  } while (0)
"""


def build_mutant(folder: Path, number: int, file: str, text: str) -> Path:
    """Compiled for fp32 and two widths only, which takes a third of the time."""
    sources = folder / str(number) / "router" / "csrc"
    shutil.copytree(interface.SOURCES, sources)
    shutil.copytree(ROOT / "ops" / "csrc", folder / str(number) / "csrc")
    (sources / file).write_text(text)
    kernel_file = sources / "router.cu"
    whole = kernel_file.read_text()
    begin = whole.index("#define DISPATCH")
    kernel_file.write_text(whole[:begin] + FEWER_WIDTHS + whole[whole.index('extern "C"', begin) :])
    return build_cuda_on_cpu(f"mutant_{number}", [kernel_file])


def judge(libraries: list[str]) -> dict[str, str]:
    """Library -> "same", or what shows first: outputs that differ from the C++ op's, or the signal
    that ended it.
    """
    interface.load_library()
    torch.set_num_threads(1)
    cases = []
    for mode, num_experts, num_tokens, num_segments in (
        ("top_p", 64, 600, 3),
        ("given", 64, 40, 1),
        ("top_k", 300, 70, 2),
        ("threshold", 300, 33, 1),
    ):
        # over 8: lanes own several slots of a token
        spec = spec_of(mode, num_experts, top_k=14, max_experts=20)
        logits, arguments = draw(spec, num_tokens, num_segments=num_segments)
        cases.append((logits, spec, arguments, run("", logits, spec, **arguments)))
    verdicts = {}
    for library in libraries:
        reader, writer = os.pipe()
        child = os.fork()  # a broken kernel may abort
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            verdict = "same"
            for order, (logits, spec, arguments, expected) in (
                (o, c) for o in (*ORDERS, "4", "5") for c in cases
            ):
                os.environ["CUDA_ON_CPU_SEED"] = order
                if wrong := differences(run(library, logits, spec, **arguments), expected):
                    verdict = f"seed {order or 'none'}, {spec.mode}: {', '.join(wrong)}"
                    break
            os.write(writer, verdict.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            verdict = pipe.read().decode()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        verdicts[library] = verdict if status == 0 else f"ended with {status}"
    return verdicts


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str]:
    """Name of a mutant -> verdict of judge. Two builds, then two judges, at a time."""
    folder, changes = tmp_path_factory.mktemp("mutants"), mutants()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("LOADSTONE_KERNELS", str(folder / "kernels"))
        built = [
            pool.submit(build_mutant, folder, i, *change)
            for i, change in enumerate(changes.values())
        ]
        libraries = [str(b.result()) for b in built]
        patch.undo()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}

        def ask(part: list[str]) -> dict[str, str]:
            result = subprocess.run(
                [sys.executable, __file__, *part], env=env, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            return json.loads(result.stdout.splitlines()[-1])

        answers = [
            a for half in pool.map(ask, (libraries[::2], libraries[1::2])) for a in half.items()
        ]
    by_library = dict(answers)
    return {name: by_library[library] for name, library in zip(changes, libraries, strict=True)}


@pytest.mark.nightly
def test_fewer_widths_change_nothing(verdicts):
    assert verdicts["nothing"] == "same"


@pytest.mark.nightly
@pytest.mark.parametrize("name", barriers())
def test_a_missing_barrier_shows(verdicts, name):
    if name in UNSEEN:
        assert verdicts[name] == "same", (
            f"it shows after all ({verdicts[name]}): take it out of UNSEEN"
        )
    else:
        assert verdicts[name] != "same", "no seed shows it"


@pytest.mark.nightly
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_permutation_shows(verdicts, name):
    assert verdicts[name] != "same"


# The other compiler


def test_a_spill_is_read_from_the_report_of_ptxas():
    """A function that is not inlined reports below its kernel, and its spill is the kernel's."""
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 256 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperPKfi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
"""
    assert resources(report) == {"_Z1aPf": Resources(64, 256, 0), "_Z1bPf": Resources(32, 16, 20)}


if __name__ == "__main__":
    print(json.dumps(judge(sys.argv[1:])))
