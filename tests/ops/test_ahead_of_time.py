"""What compiling ahead of time refuses beside spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KERNEL = """
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops.compile.ahead_of_time import transposed_accumulators


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, TRANSPOSED: tl.constexpr):
    i = tl.arange(0, 64)
    places = i[:, None] * 64 + i[None, :]
    a, b = tl.load(a_ptr + places), tl.load(b_ptr + places)
    c = tl.dot(a, tl.trans(b)) if TRANSPOSED == "operand" else tl.dot(a, b)
    if TRANSPOSED == "accumulator":
        c = tl.trans(c)
    tl.store(out_ptr + places, c)


found = {}
for architecture in (80, 90):
    for what in ("nothing", "operand", "accumulator"):
        signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
        pointers = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        source = ASTSource(
            fn=product_kernel,
            signature={**signature, "TRANSPOSED": "constexpr"},
            constexprs={(3,): what},
            attrs=pointers,
        )
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        found[f"{architecture} {what}"] = transposed_accumulators(binary.asm["ttgir"])
print(json.dumps(found))
"""


def test_a_transposed_accumulator_is_seen_and_a_transposed_operand_is_let_pass(tmp_path):
    """The rule hangs on how Triton's GPU dialect is spelt, so the compiler itself is asked."""
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, number in found.items() if number} == {
        "80 accumulator",
        "90 accumulator",
    }


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_entries_under_equal_and_learned_weights_are_summed_in_one_order(architecture):
    """Their bits are equal only while the compiler lays the tiles of both kernels out alike."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.compile.ahead_of_time import job_of, sparse_attention_launches
    from ops.sparse_attention import SparseAttentionSpec

    found = {}
    for launch in sparse_attention_launches(architecture, 8, 2, 128, SparseAttentionSpec()):
        job = job_of(launch, "")
        name = job.title.strip()
        if name not in ("pool", "weigh"):
            continue
        source = ASTSource(
            fn=job.kernel, signature=job.signature, constexprs=job.constants, attrs=job.attributes
        )
        target = GPUTarget("cuda", architecture, 32)
        program = triton.compile(source, target=target, options=job.options).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", program, re.MULTILINE))
        summed = r'"tt\.reduce".*?\}\) : \(tensor<([^,]*), (#\w+)>\)'
        sums = re.findall(summed, program, re.DOTALL)
        found[name] = {(shape, layouts[layout]) for shape, layout in sums}
        assert len(sums) >= 3, "reductions are spelt otherwise"
    assert len(found["pool"]) == 1 and found["pool"] == found["weigh"]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, []),
        ({"boxes": 0}, ["DESCRIPTORS WITHOUT TMA"]),
        ({"spilled": 8}, ["SPILLS 8 BYTES"]),
        ({"shared": 200_000}, ["TOO MUCH SHARED MEMORY"]),
        ({"shared": 200_000, "transposed": 2}, ["TOO MUCH SHARED MEMORY", "TRANSPOSES 2 ACCUM"]),
    ],
)
def test_what_is_refused_is_named(changes, refused):
    pytest.importorskip("triton")
    from ops.compile.ahead_of_time import Job, Usage, complaints

    signature = {"k_ptr": "*bf16", "k_box": "tensordesc<bf16[64,128]>"}
    job = Job("attend", None, signature, {}, {}, {})
    usage = {"registers": 9, "spilled": 0, "shared": 9, "products": "", "transposed": 0, "boxes": 2}
    found = complaints(job, Usage(**(usage | changes)), 80)
    assert len(found) == len(refused)
    assert all(x.startswith(y) for x, y in zip(found, refused, strict=True))
    del signature["k_box"]
    assert complaints(job, Usage(**(usage | {"boxes": 0})), 80) == []


def test_words_that_no_title_has_are_refused(capsys):
    pytest.importorskip("triton")
    from ops.compile.ahead_of_time import main

    assert main(["90", "gather_atend"]) == 1
    assert "no kernel has gather_atend in its title" in capsys.readouterr().out
