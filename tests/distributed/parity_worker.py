"""Train the same tiny model under DeepSpeed on this many ranks and in one plain process; print the
differences.

Each case of argv[1] (JSON list) prints one JSON line: relative errors of loss, every gradient, the
global gradient norm, first moments (which show clipping, as Adam's update hides scale) and
parameters after a few steps.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from model.moe import balance as balance_module
from model.parallel.heads import HeadExchange
from model.parallel.tensor import TensorExchange
from model.request import ForwardRequest, TokenBatch, part_of
from ops.all_to_all import by_turns

sys.path.insert(0, str(Path(__file__).parent))
from common import batch, build, take, tiny_config

from model.attention.base import STATS, SequenceLayout
from model.attention.sparse import SparseAttention
from model.config import (
    BalanceConfig,
    BudgetConfig,
    ExpertsConfig,
    FailSafeConfig,
    ModelConfig,
)
from model.cost.stages import ranges_of
from model.layers import RowLinear
from model.loss import IGNORE_INDEX, ModelOutput, joined, targets_ahead, training_loss
from model.moe.balance import unpack_stats
from model.moe.budget import start_routers, update_routers
from model.moe.experts import Experts
from model.parallel import deal
from model.parallel.gather import _Placed
from model.parallel.groups import ParallelGroups, destroy_parallel, initialize_parallel
from model.placement.record import LayerPlacement, Placement
from model.routers.config import (
    NullExpertsConfig,
    ReLUConfig,
    ThresholdConfig,
    TopKConfig,
    TopPConfig,
)
from model.transformer import Transformer
from train.config.training import OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.engine.library import import_deepspeed
from train.engine.muon.masters import place_matrices
from train.engine.muon.optimizer import MOMENTUM, Muon
from train.engine.optimizer import build_optimizer
from train.engine.partition import Partition
from train.guard.routing import RoutingControl
from train.pipeline import flow
from train.pipeline.flow import Pipeline, given
from train.pipeline.schedule import Pass

ROWS = 8  # of one micro-batch over all ranks
STEPS = 3
"""Of an update the second shows what it left, and ZeRO-3 fetches ahead from the second step on.
A case whose controllers or attention begin otherwise asks for more.
"""
ROUTERS = {
    "top_k": (TopKConfig, {}),
    "top_p": (TopPConfig, {"budget": 2.0, "initial_top_p": 0.35}),
    "threshold": (ThresholdConfig, {"budget": 2.0}),
    "relu": (ReLUConfig, {"budget": 2.0}),
    "null_experts": (NullExpertsConfig, {"top_k": 4, "num_null_experts": 4, "budget": 2.0}),
    "group_limited": (TopKConfig, {"num_groups": 4, "top_groups": 2}),
    "biased": (TopKConfig, {"bias": True}),
    "capacity": (TopKConfig, {"capacity_factor": 8.0}),
    "hashed": (TopKConfig, {"hash_layers": 1, "score_function": "sqrt_softplus"}),
}
BUDGET, FAIL_SAFE = BudgetConfig(warm_start_steps=1, blend_steps=2), FailSafeConfig()


def counts_of(step: int, num_micro: int) -> tuple[int, int]:
    batches = [batch(step, m, ROWS) for m in range(num_micro)]
    return (
        sum(int((b["targets"] != IGNORE_INDEX).sum()) for b in batches),
        sum(int(b["token_mask"].sum()) for b in batches),
    )


def mtp_targets_of(step: int, num_micro: int, num_modules: int) -> list[int]:
    batches = [batch(step, m, ROWS) for m in range(num_micro)]
    return [
        sum(
            int((targets_ahead(b["targets"], b["positions"], k) != IGNORE_INDEX).sum())
            for b in batches
        )
        for k in range(1, num_modules + 1)
    ]


def relative(ours: torch.Tensor, reference: torch.Tensor, floor: float = 1e-12) -> float:
    """Error over the reference's norm, or over `floor` where that norm is smaller (rounding of
    near-zero gradients).
    """
    return float(
        (ours.double() - reference.double()).norm() / reference.double().norm().clamp_min(floor)
    )


def local_parts(model: torch.nn.Module) -> dict[str, list[int]]:
    """Global ids of the experts stacked in each expert parameter, by its name."""
    return {
        f"{name}.{key}": list(module.global_ids)
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for key, _ in module.named_parameters(recurse=False)
    }


def shuffled_placement(num_experts: int, num_layers: int, num_ranks: int, lent: int) -> Placement:
    """Another order of the experts in every layer, and the first foreign experts lent to every
    rank.
    """
    layers = []
    for layer in range(num_layers):
        order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(layer)).tolist()
        bare = LayerPlacement(tuple(order), tuple(() for _ in range(num_ranks)))
        replicas = tuple(
            tuple([e for e in order if bare.owner(e) != rank][:lent]) for rank in range(num_ranks)
        )
        layers.append(LayerPlacement(tuple(order), replicas))
    return Placement(num_ranks, tuple(layers))


def move_controllers(
    own: Transformer,
    reference: list,
    own_stats: torch.Tensor,
    reference_stats: torch.Tensor,
    balance: BalanceConfig,
    budget: BudgetConfig,
) -> float:
    """One controller step on both sides; the largest difference of their states. The ranks'
    statistics are summed here.
    """
    if not reference:
        return 0.0
    control = RoutingControl(
        own.routers(),
        own.router_kind,
        own.part.moe,
        own.groups,
        budget,
        FAIL_SAFE,
        None,
    )
    layers = control.reduce(own_stats)
    assert layers is not None
    control.update(layers, balance)
    layers = unpack_stats(reference_stats, reference[0].spec.num_experts, reference[0].max_top_k)
    update_routers(reference, layers, balance, budget, FAIL_SAFE)
    theirs_here = [reference[row] for row in own.part.moe.own]
    pairs = [
        (a, b)
        for mine, theirs in zip(own.routers(), theirs_here, strict=True)
        for (name, a), b in zip(mine.named_buffers(), theirs.buffers(), strict=True)
        if name != "histogram_range"
    ]
    floats = [a for a, _ in pairs if a.dtype != torch.int32]  # of tables
    assert all(a.dtype == torch.float32 for a in floats), "a controller lost its precision"
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def compare_attention(own: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference of the sparse layers' statistics, relative to each; the ranks' own are
    summed here. Union factors are left out: their tiles of queries follow the batch.
    """
    if not own.numel():
        return 0.0
    dist.all_reduce(own)
    kept = [i for i, name in enumerate(STATS) if name not in ("union_blocks", "tile_blocks")]
    return float(((own - reference).abs() / reference.abs().clamp_min(1e-3))[:, kept].max())


@functools.cache
def groups_for(
    expert_parallel_size: int,
    ranks_per_node: int | None,
    context_parallel_size: int,
    pipeline_parallel_size: int,
    tensor_parallel_size: int,
    context_gather_size: int,
) -> ParallelGroups:
    """Groups are made once per size: each set of gloo groups holds threads until the process
    ends.
    """
    destroy_parallel()
    return initialize_parallel(
        expert_parallel_size,
        ranks_per_node=ranks_per_node,
        context_parallel_size=context_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        context_gather_size=context_gather_size,
    )


def layers_of(case: dict, config: ModelConfig, groups: ParallelGroups) -> tuple[range, ...]:
    """Of this rank's stage, by lap: as many as the case says, or evenly."""
    size = groups.pipeline_size * case.get("virtual", 1)
    split = case.get("split") or [
        config.num_layers * (i + 1) // size - config.num_layers * i // size for i in range(size)
    ]
    return ranges_of(split)[groups.pipeline_rank :: groups.pipeline_size]


class OneStep:
    """A step's passes on this rank, as train/step.py makes them; sums what they give."""

    def __init__(
        self,
        engine: Engine,
        inputs: list[TokenBatch],
        asked: ForwardRequest,
        loss_of: Callable[[ModelOutput], torch.Tensor],
    ):
        self.engine, self.inputs, self.asked, self.loss_of = engine, inputs, asked, loss_of
        self.loss = torch.zeros((), dtype=torch.float64)
        self.attention, self.stats, self.largest = [], [], []
        self._previous: dict[int, torch.Tensor] = {}
        self._outputs: dict[tuple[int, int], ModelOutput] = {}
        self._laps: dict[int, list[ModelOutput]] = {}

    def forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        request = self.asked._replace(previous_counts=self._previous.get(one.lap))
        output = self.engine.forward(self.inputs[one.number], request, hidden, one.lap)
        self._previous[one.lap] = output.scope_counts
        self._outputs[one.unit] = output
        laps = self._laps.setdefault(one.number, [])
        laps.append(output)
        if len(laps) == len(self.engine.module.laps):
            whole = joined(self._laps.pop(one.number))
            self.attention.append(whole.attention_stats)
            self.stats.append(whole.stats)
            self.largest.append(whole.largest_logits)
        return output.handed_on

    def backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        loss = self.loss_of(self._outputs.pop(one.unit))
        self.engine.backward(loss, is_last, carried)
        self.loss += loss.detach().double()

    def pair(
        self, one: Pass, hidden: torch.Tensor | None, back: Pass, carried: torch.Tensor | None
    ) -> torch.Tensor | None:
        handed_on, _ = by_turns(
            lambda: self.forward(one, hidden), lambda: self.backward(back, carried, False)
        )
        return handed_on


def own_tokens(full: dict, groups: ParallelGroups) -> TokenBatch:
    """This rank's rows of a batch, and of those its part."""
    share = ROWS // groups.rows_size
    rows = take(full, groups.rows_rank * share, (groups.rows_rank + 1) * share)
    if groups.parts_size == 1:
        return rows
    length = rows.input_ids.shape[1] // groups.parts_size
    dealt = None
    if groups.gather_size > 1:
        # Of single tokens, so that every rank has some of every document.
        with patch.object(deal, "LEAST", 1):
            dealt = deal.Dealer(groups.gather_size, lambda places: places + 1)(rows.positions)
    return part_of(rows, groups.parts_rank * length, length, dealt)


def fault(case: dict, engine: Engine) -> AbstractContextManager:
    """A mistake that another axis than data invites, made in the ranks on purpose."""
    name = case.get("fault")
    if name is None:
        return nullcontext()
    noise, sums = SparseAttention._noise, SparseAttention._sums
    auxiliary = balance_module.auxiliary_loss_sums

    def others(exchange: HeadExchange, by_head: torch.Tensor) -> torch.Tensor:
        return by_head.chunk(exchange.size)[exchange.size - 1 - exchange.rank]

    def of_local_heads(attention: SparseAttention, layout):
        found = noise(attention, layout)
        if found is None:
            return None
        return dataclasses.replace(found, first_kv_head=0, num_kv_heads=None)

    def over_local_heads(attention: SparseAttention, q, *rest, **more):
        found = sums(attention, q, *rest, **more)
        _, whole = rest[4].place_of_heads(attention.num_heads)
        return found._replace(penalty_sum=found.penalty_sum * whole / q.shape[1])

    def of_own_tokens(counts, score_sums, scope, groups, previous):
        alone = dataclasses.replace(groups, context_size=1, tensor_size=1)
        return auxiliary(counts, score_sums, scope, alone, previous)

    def twice(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return given(tensor, 2 * gradient)

    def kept(pipeline: Pipeline, carried: torch.Tensor | None) -> torch.Tensor | None:
        with_lent(pipeline, carried)
        return carried

    def of_first_laps(flight: flow._Flight, one: Pass) -> torch.Tensor | None:
        found = carried_to(flight, one)
        return 0.0 * found if one.lap > 0 and found is not None else found

    def cut_off(exchange: TensorExchange, same: torch.Tensor) -> torch.Tensor:
        return same.chunk(exchange.size)[exchange.rank]

    def of_other_tokens(ctx, *grads: torch.Tensor):
        (order,) = ctx.saved_tensors
        others = order.roll(1, 1).unsqueeze(2).expand_as(grads[0])
        return grads[0].gather(1, others), None

    def of_first_tokens(layout: SequenceLayout, tokens: torch.Tensor | None):
        places = layout.attending()
        return tokens if tokens is None or places is None else tokens[: len(places)]

    def of_one_rank(exchange: TensorExchange, shares: torch.Tensor) -> torch.Tensor:
        return exchange.size * shares.chunk(exchange.size)[exchange.rank]

    with_lent, carried_to = Pipeline._with_lent_gradient, flow._Flight.carried
    if name == "bias on every rank":
        for module in engine.module.modules():
            if isinstance(module, RowLinear):
                module.adds_bias = True
        return nullcontext()
    if name == "scaled by rows":
        engine.loss_factor = engine.groups.rows_size
        return nullcontext()
    return {
        "gradients carried twice": patch.object(flow, "given", twice),
        "gradients of first laps alone": patch.object(flow._Flight, "carried", of_first_laps),
        "gradient of the loan dropped": patch.object(Pipeline, "_with_lent_gradient", kept),
        "gradients of other tokens": patch.object(_Placed, "backward", of_other_tokens),
        "gradients of own queries alone": patch.object(TensorExchange, "summed", of_one_rank),
        "noise of other tokens": patch.object(SequenceLayout, "of_attending", of_first_tokens),
        "losses of own tokens alone": patch.object(TensorExchange, "own", cut_off),
        "sinks of other heads": patch.object(HeadExchange, "own", others),
        "noise of local heads": patch.object(SparseAttention, "_noise", of_local_heads),
        "means over local heads": patch.object(SparseAttention, "_sums", over_local_heads),
        "sequences of own tokens": patch.object(
            balance_module, "auxiliary_loss_sums", of_own_tokens
        ),
    }[name]


def run_case(case: dict) -> dict:
    num_micro, clip, precision = case["accumulation"], case["clip"], case.get("precision", "fp32")
    config = tiny_config(**case.get("model", {}))
    kind, options = ROUTERS[case.get("router", "top_k")]
    options = {**options, "attention": case.get("attention")}
    balance = BalanceConfig(
        **{
            "aux_loss_coeff": 0.05,
            "aux_loss_scope": case["scope"],
            "z_loss_coeff": 0.01,
            **case.get("balance", {}),
        }
    )
    # A large eps makes the update nearly linear in the gradient, so that a wrong scale shows and
    # rounding does not grow.
    optim = OptimConfig(
        lr=0.01, weight_decay=0.1, eps=0.1, decay_style="constant", **case.get("optim", {})
    )
    world = dist.get_world_size()
    train = TrainConfig(
        num_steps=case.get("steps", STEPS),
        seq_len=16,
        micro_batch_size=ROWS * case.get("cp", 1) * case.get("tp", 1) * case.get("pp", 1) // world,
        global_batch_size=ROWS * num_micro,
        clip_grad_norm=clip,
        precision=precision,
    )

    # The reference computes with the definition, so that backend of the experts and chunks of the
    # loss are compared as well.
    master = build(
        dataclasses.replace(config, loss_chunk_size=0),
        balance,
        router=kind,
        experts=ExpertsConfig(
            backend="reference", precision=case.get("experts", {}).get("precision", "native")
        ),
        **options,
    )
    start_routers(master.routers(), BUDGET, FAIL_SAFE)
    reference_optimizer = build_optimizer(master, optim, "experts")
    if isinstance(reference_optimizer, Muon):
        place_matrices(reference_optimizer, master, None, 0, torch.device("cpu"))
    # In bf16 the reference computes with a rounded copy of fp32 masters, as ZeRO does; in fp32 it
    # is the master itself.
    reference = copy.deepcopy(master).to(torch.bfloat16) if precision == "bf16" else master
    groups = groups_for(
        case["ep"],
        case.get("ranks_per_node"),
        case.get("cp", 1),
        case.get("pp", 1),
        case.get("tp", 1),
        case.get("gather", 1),
    )
    budget = dataclasses.replace(BUDGET, scope=case.get("budget_scope", BUDGET.scope))
    placement = None
    if "lent" in case:
        placement = shuffled_placement(
            config.num_experts, len(config.moe_layers), case["ep"], case["lent"]
        )
    zero = {"zero_optimization": {"stage": case["zero"], **case.get("zero_options", {})}}
    own_model = build(
        config,
        balance,
        groups,
        router=kind,
        dispatcher=case.get("dispatcher"),
        placement=placement,
        experts=ExpertsConfig(**case.get("experts", {})),
        layers=layers_of(case, config, groups),
        # Shared out as soon as it is drawn, as a run does.
        settle=Partition(groups, train, zero) if case["zero"] == 3 else None,
        **options,
    )
    parts = local_parts(own_model)
    start_routers(own_model.routers(), BUDGET, FAIL_SAFE)
    engine = Engine(
        own_model,
        groups,
        train,
        optim,
        zero,
    )
    errors = {
        "loss": 0.0,
        "gradient": 0.0,
        "norm": 0.0,
        "moment": 0.0,
        "parameter": 0.0,
        "controller": 0.0,
        "attention": 0.0,
    }
    pipeline = Pipeline(engine, groups, case.get("overlap", False))
    masters, computed = dict(master.named_parameters()), dict(reference.named_parameters())
    z_loss = case.get("z_loss", 0.0)
    asked = ForwardRequest(
        measure_attention=True, with_logit_z=z_loss > 0, measure_logits=case.get("largest", False)
    )
    for step in range(case.get("steps", STEPS)):
        num_targets, num_tokens = counts_of(step, num_micro)
        mtp = (0.3, mtp_targets_of(step, num_micro, config.num_mtp_layers))
        reference.zero_grad()
        reference_loss, previous = 0.0, None
        reference_stats, reference_attention, reference_largest = [], [], []
        for model in (reference, engine.module):
            model.set_step(step)
        for micro in range(num_micro):
            output = reference(
                take(batch(step, micro, ROWS), 0, ROWS),
                asked._replace(previous_counts=previous),
            )
            previous = output.scope_counts
            reference_attention.append(output.attention_stats)
            reference_stats.append(output.stats)
            reference_largest.append(output.largest_logits)
            loss = training_loss(output, num_targets, num_tokens, balance, *mtp, z_loss)
            loss.backward()
            reference_loss += float(loss)
        inputs = [own_tokens(batch(step, micro, ROWS), groups) for micro in range(num_micro)]
        done = OneStep(
            engine,
            inputs,
            asked,
            functools.partial(
                training_loss,
                num_targets=num_targets,
                num_tokens=num_tokens,
                balance=balance,
                mtp_coeff=mtp[0],
                num_mtp_targets=mtp[1],
                z_loss_coeff=z_loss,
            ),
        )
        with fault(case, engine):
            pipeline.run(num_micro, inputs[0].input_ids.shape, done)
        own = done.loss
        dist.all_reduce(own)
        if case.get("largest"):
            largest = torch.stack(done.largest).amax(0)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            expected = torch.stack(reference_largest).amax(0)
            errors["attention"] = max(errors["attention"], relative(largest, expected))
        own_attention = engine.module.part.sparse.placed(sum(done.attention))
        errors["attention"] = max(
            errors["attention"], compare_attention(own_attention, sum(reference_attention))
        )
        errors["loss"] = max(errors["loss"], abs(float(own) - reference_loss) / abs(reference_loss))
        floor = 1e-2 * float(
            torch.stack([p.grad.double().norm() for p in computed.values()]).norm()
        )
        for name, parameter in engine.named_parameters():
            gradient = engine.full_gradient(parameter)
            assert gradient is not None, f"{name} has no gradient"
            expected = computed[name].grad[parts.get(name, slice(None))]
            errors["gradient"] = max(errors["gradient"], relative(gradient, expected, floor))
        for name in masters:
            masters[name].grad = computed[name].grad.to(masters[name].dtype)
        norm = torch.nn.utils.clip_grad_norm_(
            master.parameters(), clip if clip > 0 else float("inf")
        )
        reference_optimizer.step()
        with torch.no_grad():
            for name in masters:
                computed[name].copy_(masters[name])
        errors["norm"] = max(errors["norm"], abs(engine.step() - float(norm)) / float(norm))
        errors["controller"] = max(
            errors["controller"],
            move_controllers(
                engine.module,
                reference.routers(),
                sum(done.stats),
                sum(reference_stats),
                balance,
                budget,
            ),
        )
    engine.prepare_gather()
    moments = {}
    for parameter, state in reference_optimizer.state.items():
        key = MOMENTUM if MOMENTUM in state else "exp_avg"
        moments[parameter] = (key, state[key])
    floor = 1e-2 * float(torch.stack([m.norm() for _, m in moments.values()]).norm())
    for name, parameter in engine.named_parameters():
        expected = masters[name]
        key, moment = moments[expected]
        assert key in engine.state_keys(parameter)
        errors["parameter"] = max(
            errors["parameter"],
            relative(
                engine.gather_state(parameter, "fp32"), expected[parts.get(name, slice(None))]
            ),
        )
        errors["moment"] = max(
            errors["moment"],
            relative(
                engine.gather_state(parameter, key),
                moment[parts.get(name, slice(None))],
                floor,
            ),
        )
    engine.close()
    everyone = [None] * world
    dist.all_gather_object(everyone, errors)
    return {name: max(e[name] for e in everyone) for name in errors}


def main() -> None:
    torch.set_num_threads(1)
    import_deepspeed()
    dist.init_process_group("gloo")
    for case in json.loads(sys.argv[1]):
        errors = run_case(case)
        if dist.get_rank() == 0:
            print(json.dumps({"case": case, "errors": errors}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
