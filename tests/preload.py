"""What commands and ranks import before they do anything; tests/forked.py imports it once for all
of them.

Nothing here may start a thread, make a generator of random numbers move, or touch a device.
"""

from __future__ import annotations

import gc
import inspect
import os

# with a GPU, DeepSpeed looks for it in every process, as outside tests
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hydra
import megatron.core  # wandb, TensorBoard and torch's compiler with it
import megatron.core.datasets.gpt_dataset
import megatron.core.optimizer_param_scheduler
import megatron.core.parallel_state
import pyarrow.parquet
import tokenizers
import torch
import torch._dynamo
import torch.distributed.checkpoint

import launch.config.contradictions
import launch.saved.resume
import train.loop
import train.trained.evaluate
from launch.config.overrides import plain
from launch.config.parse import parse
from tests.composing import composed
from train.engine.library import import_deepspeed

import_deepspeed()

LOADED = (hydra, megatron, pyarrow, tokenizers, torch, launch, train)

# What these keep of a first use every fork finds: Hydra's plugins and grammar, the types of our
# records, and, of a look for the file of a frame, the files of all modules.
parse(plain(composed()), 1)
inspect.getframeinfo(inspect.currentframe())

# What is imported stays. A fork that looked through it for garbage, as DeepSpeed has every engine
# of ZeRO-3 do, would copy the memory of all of it and find none.
gc.collect()
gc.freeze()
