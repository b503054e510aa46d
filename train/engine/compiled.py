"""train.compile=blocks: every block of a model as one graph, for its passes in training.

The router and the experts' products are ops of ours inside of that graph and compute what they
compute outside of it; what the compiler fuses is what stands around them: norms, rotary angles,
residuals, the shared expert's activation. Evaluation and generation, whose shapes vary, stay as
they are, and so do the few passes of training that ask a block for more (`Transformer.compiled`).

What torch's compiler writes lies beside our compiled kernels (ops/compile/cuda.py), in `inductor`.
"""

from __future__ import annotations

import os

import torch

from model.transformer import Transformer
from ops.compile.cuda import cache_folder, require_own
from ops.router import select_backend

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_blocks(model: Transformer, device: torch.device, backend: str = "inductor") -> None:
    """Let the model's passes in training go through compiled blocks. The compiler starts at the
    first pass, which takes as long as it does.

    Args:
        backend: torch.compile's: `aot_eager` traces the graphs, forward and backward, and runs them
            as they are.

    Raises:
        BuildError: the folder of compiled code is another user's, who could write into it what
            would run here.
    """
    # torch runs what it finds in its cache, and the folder that it would choose is in /tmp. Whoever
    # has imported its compiler before has had that choice written into the environment.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = cache_folder() / "inductor"
    folder.mkdir(parents=True, exist_ok=True)
    require_own(folder)
    if os.environ.get(CACHE) in (None, default_cache_dir()):
        os.environ[CACHE] = str(folder)

    # A library that is built and opened cannot be traced, so it is there before.
    select_backend(device, torch.float32)

    # Blocks share their code, and the compiler counts variants of code: those of every block count
    # together, and beyond the limit they would run uncompiled without a word.
    limit = 8 * len(model.blocks)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * limit)
    model.compiled = {
        number: torch.compile(block, fullgraph=True, backend=backend)
        for number, block in zip(model.part.layers, model.blocks, strict=True)
    }
