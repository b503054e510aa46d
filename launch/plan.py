"""What a config would cost, without any device: python -m launch.plan [the overrides of launch.train, resume=RUN too].

Prints parameters, memory per device, batch arithmetic, FLOPs and every problem; exit code 1 if it cannot run.
"""

from __future__ import annotations

if not __package__:
    raise SystemExit("run from the repository root as: python -m launch.plan")

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.common import plain, print_result, run_main, world_size
from model.memory import DeviceMemory, device_memory

GIB = 2**30


def main(config: DictConfig) -> None:
    """Print the plan; raises SystemExit(1) when the config cannot run."""
    from launch.train import tell_changes, with_saved_config
    from launch.validate import ConfigError, check_tokenizer, parse

    config = with_saved_config(config)
    num_ranks = world_size(config)
    try:
        run = parse(plain(config), num_ranks)
        path = run.data.tokenizer.path
        if path is None or Path(path).expanduser().exists():
            check_tokenizer(run)
        else:  # a plan may be made where the data are not
            print(f"data.tokenizer.path={path} is not on this machine: whether model.vocab_size covers it was not checked")
        tell_changes(config, run)
    except ConfigError as error:
        print(f"{len(error.problems)} problem(s); this config cannot run:")
        for problem in error.problems:
            print(f"  error: {problem}")
        print_result({"problems": error.problems})
        raise SystemExit(1) from None
    print_result(describe(run, num_ranks))


def describe(run: Any, num_ranks: int) -> dict[str, Any]:
    """Print the tables and return their numbers."""
    from model.flops import count_parameters, flops_per_token

    model, settings = run.model, run.train
    count = count_parameters(model, run.experts_per_token, run.attention.arguments)
    expert_size = run.parallel.expert_parallel_size
    memory = planned_memory(run, num_ranks)
    micro_steps = run.gradient_accumulation_steps(num_ranks)
    tokens = settings.global_batch_size * settings.seq_len
    flops = flops_per_token(model, run.experts_per_token, settings.seq_len, run.attention.arguments)

    print("parameters")
    for label, value in (("embedding and head", count.embedding), ("attention", count.attention),
                         ("dense MLPs", count.dense_mlp), ("routers", count.router),
                         ("shared experts", count.shared_experts), ("routed experts", count.experts),
                         ("norms", count.norms), ("total", count.total), ("active per token", count.active)):
        print(f"  {label:28s} {value:>20,}")
    print(f"memory per device ({num_ranks} ranks, expert parallel {expert_size}, ZeRO {run.zero_stage}, "
          f"{settings.precision}, gradients in {settings.grad_accum_dtype})")
    for label, value in (("dense weights", memory.dense_weights), ("expert weights", memory.expert_weights),
                         ("gradients", memory.gradients), ("optimizer state", memory.optimizer),
                         ("activations (estimate)", memory.activations), ("logits", memory.logits),
                         ("total", memory.total)):
        print(f"  {label:28s} {value / GIB:>16.3f} GiB")
    print("batch")
    print(f"  {settings.global_batch_size} sequences of {settings.seq_len} = {settings.micro_batch_size} per device x "
          f"{num_ranks} ranks x {micro_steps} accumulation steps; {tokens:,} tokens a step, "
          f"{tokens * settings.num_steps:,} in {settings.num_steps:,} steps")
    print(f"compute\n  {flops:.4g} FLOPs per token (forward and backward), {flops * tokens:.4g} per step, "
          f"{flops * tokens * settings.num_steps:.4g} for the run")
    return {"problems": [], "parameters": count.total, "active_parameters": count.active,
            "memory_bytes": {**vars(memory), "total": memory.total},
            "gradient_accumulation_steps": micro_steps, "tokens_per_step": tokens, "flops_per_token": flops}


def planned_memory(run: Any, num_ranks: int) -> DeviceMemory:
    """Bytes on the fullest device of a run."""
    return device_memory(run.model, run.experts_per_token, precision=run.train.precision, zero_stage=run.zero_stage,
                         world_size=num_ranks, expert_parallel_size=run.parallel.expert_parallel_size,
                         micro_batch_size=run.train.micro_batch_size, seq_len=run.train.seq_len,
                         attention=run.attention.arguments, recompute_experts=run.experts.recompute,
                         grad_accum_dtype=run.train.grad_accum_dtype)


if __name__ == "__main__":
    run_main("train", main)
