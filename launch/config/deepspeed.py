"""Which keys of DeepSpeed's own config may be set here, and which are ours."""

from __future__ import annotations

from launch.config.build import _suggest
from train.config.run import RunConfig

# DeepSpeed settings that users may give. Everything else is refused: DeepSpeed itself ignores
# unknown keys silently. tests/launch/test_validate.py checks these names against DeepSpeed's own
# models.
ZERO_KEYS = frozenset(
    {
        "stage",
        "overlap_comm",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "allgather_partitions",
        "round_robin_gradients",
        "offload_optimizer",
        "offload_param",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save",
    }
)
ZERO_SWITCHES = frozenset(
    {
        "overlap_comm",
        "allgather_partitions",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
    }
)
ZERO_SIZES = ZERO_KEYS - ZERO_SWITCHES - {"stage", "offload_optimizer", "offload_param"}
DEEPSPEED_KEYS = frozenset({"zero_optimization", "communication_data_type"})
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.clip_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision=bf16",
    "data_types": "train.grad_accum_dtype",
    "optimizer": "optim",
    "scheduler": "optim.decay_style",
    "activation_checkpointing": "model.recompute",
    "expert_parallel": "parallel.expert_parallel_size",
    "tensorboard": "tracker.tensorboard",
    "wandb": "tracker.wandb.mode",
    "steps_per_print": "train.log_interval",
}
REMOVED_KEYS = frozenset(
    {
        "elasticity",
        "sparse_attention",
        "compression_training",
        "amp",
        "progressive_layer_drop",
        "eigenvalue",
        "curriculum_learning",
        "nebula",
        "zero_force_ds_cpu_optimizer",
    }
)


def _deepspeed(run: RunConfig) -> list[str]:
    problems = []
    for key in run.deepspeed:
        if key in OWNED_KEYS:
            problems.append(f"deepspeed.{key} belongs to Loadstone: set {OWNED_KEYS[key]}")
        elif key in REMOVED_KEYS:
            problems.append(f"deepspeed.{key} is not available in this DeepSpeed version")
        elif key not in DEEPSPEED_KEYS:
            problems.append(_suggest(key, "deepspeed.", set(DEEPSPEED_KEYS)))

    zero = run.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [
            *problems,
            f"deepspeed.zero_optimization is {zero!r}; it must be a group of settings",
        ]
    problems += [
        _suggest(key, "deepspeed.zero_optimization.", set(ZERO_KEYS))
        for key in zero
        if key not in ZERO_KEYS
    ]

    for key, value in zero.items():
        if key in ZERO_SIZES and (type(value) is not int or value < 0):
            problems.append(
                f"deepspeed.zero_optimization.{key} is {value!r}; it must be a whole number"
            )
        elif key in ZERO_SWITCHES and not isinstance(value, bool):
            problems.append(
                f"deepspeed.zero_optimization.{key} is {value!r}; it must be true or false"
            )
        elif str(key).startswith("offload_") and not (
            isinstance(value, dict) and set(value) <= {"device", "pin_memory"}
        ):
            problems.append(
                f"deepspeed.zero_optimization.{key} is {value!r}; "
                f"give {{device: cpu, pin_memory: true|false}}"
            )
            return problems

    if zero.get("round_robin_gradients"):
        problems.append(
            "deepspeed.zero_optimization.round_robin_gradients is true: this DeepSpeed version "
            "then takes other parameters' fp32 weights and moments for a parameter's own, and "
            "checkpoints would hold them; leave it out"
        )
    if run.deepspeed.get("communication_data_type") not in (None, "fp32", "bf16", "fp16"):
        problems.append(
            "deepspeed.communication_data_type is "
            f"{run.deepspeed['communication_data_type']!r}; choose fp32, bf16 or fp16"
        )

    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
        return problems

    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "cpu")
        if device not in ("cpu", "none"):
            problems.append(
                f"deepspeed.zero_optimization.{name}.device is {device!r}; only cpu is supported"
            )

    if zero.get("offload_optimizer") and stage < 1:
        problems.append("deepspeed.zero_optimization.offload_optimizer needs stage 1, 2 or 3")
    if zero.get("offload_param") and stage != 3:
        problems.append("deepspeed.zero_optimization.offload_param needs stage 3")
    return problems
