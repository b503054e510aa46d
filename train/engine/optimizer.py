"""Parameter groups, and the optimizer that moves them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.parallel.family import Family, family_of, is_expert_parameter, own_shape
from model.scaling import PLAIN, Factors, factors_of
from model.transformer import Transformer
from train.config.kinds import KINDS, is_hidden_matrix, kind_of, layer_of, matches, unmatched
from train.config.training import GroupConfig, OptimConfig
from train.engine.average import AveragedAdamW, MovingAverage
from train.engine.muon.optimizer import Muon
from train.engine.rounding import RoundedAdamW

TENSOR_GROUP = "tp_shard_0"
"""DeepSpeed's name of what tensor parallelism has cut. It reads a size in the third word, and looks
for the largest: cut matrices have none.
"""


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Mark what stays as it is (optim.freeze): it asks for no gradient from now on.

    Raises:
        ValueError: a part means no parameter, or all parts together mean every one.
    """
    names = [name for name, _ in model.named_parameters()]
    _require_matches("optim.freeze", parts, names)
    for name, parameter in model.named_parameters():
        if any(matches(name, part) for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"optim.freeze {list(parts)} leaves nothing to train; take a part out of it"
        )


def parameter_groups(
    model: nn.Module, config: OptimConfig, expert_group: str | None
) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norm gains, biases) do not; experts form groups of their own, as
    DeepSpeed requires, what tensor parallelism cuts likewise, and so does what Muon moves (`muon`),
    what optim.groups names, routers whose learning rate rises by itself, and under model.init=mup
    what has the same role. Experts' parameters are stacked, so that their vectors have two
    dimensions.

    Every parameter that is trained lands in exactly one group.

    Raises:
        ValueError: one of optim.groups means no parameter that is trained, or asks for Muon where
            nothing is a matrix.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # A rule may mean what another stage of a pipeline has, and depth is that in the whole model.
    everything = trained
    if isinstance(model, Transformer) and not model.part.is_whole:
        everything = list(model.whole().named_parameters())
    below = layers_below_the_top([name for name, _ in everything])
    shape = model.config if isinstance(model, Transformer) else None
    found = _together(trained, config, below, shape)
    every = found if everything is trained else _together(everything, config, below, shape)
    names = [name for name, _ in everything]
    _require_matches("optim.groups", [group.match for group in config.groups], names)
    for i, meant in enumerate(config.groups):
        if not any(_is_meant(name, meant) for name in names):
            raise ValueError(
                f"optim.groups[{i}]: no parameter that {meant.match!r} means is in layers "
                f"{list(meant.layers or ())}; give others, or drop the rule"
            )
    _require_muon(config, {rule for rule, _, by_muon, *_ in every if by_muon})

    groups: list[dict[str, Any]] = []
    for key, parameters in sorted(found.items(), key=lambda item: item[0]):
        rule, sort, by_muon, depth, (scale, eps_scale), rises = key
        family, is_vector = _SORTED[sort // 2], sort % 2 == 1
        usual = 0.0 if is_vector else config.weight_decay
        settings = config.groups[rule] if rule >= 0 else None
        given = None if settings is None else settings.weight_decay
        decay = usual if given is None else given
        group: dict[str, Any] = {
            "params": parameters,
            "name": {Family.EXPERT: expert_group, Family.TENSOR: TENSOR_GROUP}.get(
                family, "dense_no_decay" if is_vector else "dense"
            ),
            "weight_decay": decay,
            "wd_mult": 0.0 if is_vector else 1.0,
            "muon": by_muon,
        }
        if family is not Family.REPLICATED:
            group["moe"] = True
        if rises:
            group["warmup_steps"] = config.router_warmup_steps
        factor = 1.0 if settings is None else settings.lr_factor
        if config.layer_lr_decay is not None:
            factor *= config.layer_lr_decay**depth
        is_scaled = (scale, eps_scale) != (1.0, 1.0)
        if is_scaled:
            # What decays in a step is the product of both, and stays.
            factor *= scale
            given = decay = decay / scale
            group |= {"weight_decay": decay, "eps": config.eps * eps_scale}
        if settings is not None or config.layer_lr_decay is not None or is_scaled:
            group |= {
                "own_weight_decay": given,
                "lr_factor": factor,
                "max_lr": config.lr * factor,
                "min_lr": config.min_lr * factor,
            }
        groups.append(group)
    assert sum(len(g["params"]) for g in groups) == len(trained)
    return groups


_SORTED = (Family.REPLICATED, Family.EXPERT, Family.TENSOR)
"""The order of groups, the same on every rank and stage."""
_Key = tuple[int, int, bool, int, tuple[float, float], bool]


def _together(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    below: dict[str, int],
    shape: ModelConfig | None,
) -> dict[_Key, list[nn.Parameter]]:
    """What belongs together, in this order: by rule of optim.groups; matrices, vectors, experts'
    matrices, experts' vectors, those that are cut; of any kind of matrices AdamW's and then Muon's;
    of each by layers, from the last one down, where these differ; by muP's factors on learning rate
    and epsilon; routers, where their learning rate rises by itself. below: layers_below_the_top.
    """
    found: dict[_Key, list[nn.Parameter]] = {}
    for name, parameter in named:
        rule = next((i for i, group in enumerate(config.groups) if _is_meant(name, group)), -1)
        is_expert = is_expert_parameter(parameter)
        is_vector = len(own_shape(parameter)) < 2 + is_expert
        by_muon = _is_moved_by_muon(name, parameter, config, rule)
        depth = 0 if config.layer_lr_decay is None else below[name]
        scaled = PLAIN if shape is None else factors_of(shape, name, not is_vector)
        sort = 2 * _SORTED.index(family_of(parameter)) + is_vector
        rises = config.router_warmup_steps > 0 and kind_of(name) == "router"
        key = (rule, sort, by_muon, depth, _scales(scaled, by_muon), rises)
        found.setdefault(key, []).append(parameter)
    return found


def _scales(factors: Factors, by_muon: bool) -> tuple[float, float]:
    """On the learning rate and on AdamW's epsilon, which Muon does not have."""
    return (factors.muon_lr, 1.0) if by_muon else (factors.adamw_lr, factors.adamw_eps)


def layers_below_the_top(names: list[str]) -> dict[str, int]:
    """How many layers each parameter lies below what follows the last layer: 0 for the last norm,
    the head and multi-token prediction, 1 for the last layer, one more than the first layer's for
    the embedding, tied or not (Clark et al., ELECTRA, arXiv 2003.10555, appendix A).
    """
    layers = {n: layer for n in names if (layer := layer_of(n)) is not None}
    number = max(layers.values(), default=-1) + 1
    return {
        name: number - layers[name]
        if name in layers
        else number + 1
        if name.startswith("embedding.")
        else 0
        for name in names
    }


def _is_meant(name: str, group: GroupConfig) -> bool:
    """Whether a rule of optim.groups is about the parameter of this name."""
    if group.layers is not None:
        layer = layer_of(name)
        if layer is None or not group.layers[0] <= layer <= group.layers[1]:
            return False
    return matches(name, group.match)


def _is_moved_by_muon(name: str, parameter: nn.Parameter, config: OptimConfig, rule: int) -> bool:
    """Whether Muon has this parameter. rule: number of the one of optim.groups that it falls under,
    or -1.

    By default it is a matrix between layers; a rule that asks for Muon gives it any matrix. One of
    a single row or column is a vector, whose nearest orthogonal matrix is itself over its norm.
    """
    asked = config.groups[rule].optimizer if rule >= 0 else None
    if (asked or config.optimizer) != "muon":
        return False
    shape = own_shape(parameter)
    is_matrix = len(shape) == 2 + is_expert_parameter(parameter) and min(shape[-2:]) > 1
    return is_matrix and (asked == "muon" or is_hidden_matrix(name))


def _require_muon(config: OptimConfig, rules: set[int]) -> None:
    """Raises ValueError where a rule asks for Muon and gives it nothing."""
    for i, group in enumerate(config.groups):
        if group.optimizer == "muon" and i not in rules:
            raise ValueError(
                f"optim.groups[{i}].optimizer is muon, but no parameter that {group.match!r} means "
                "is a matrix; drop it"
            )
    if config.optimizer == "muon" and not rules:
        raise ValueError(
            "optim.optimizer is muon, but none of what is trained is a matrix that it would move; "
            "use optim=adamw"
        )


def _require_matches(setting: str, parts: Sequence[str], names: list[str]) -> None:
    for part in unmatched(parts, names):
        near = difflib.get_close_matches(part, [*KINDS, *names], 1)
        raise ValueError(
            f"{setting}: {part!r} means no parameter of this model"
            + (f"; did you mean {near[0]}?" if near else "")
            + f" Kinds are {', '.join(KINDS)}; anything else is a pattern of names, as "
            f"{names[0] if names else 'norm.weight'}"
        )


def trained_by_kind(named: Iterable[tuple[str, nn.Parameter, int]]) -> dict[str, tuple[int, int]]:
    """Kind -> elements that are trained, and elements, of (name, parameter, elements)."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter, number in named:
        trained, whole = found.get(kind_of(name), (0, 0))
        found[kind_of(name)] = (trained + number * parameter.requires_grad, whole + number)
    return found


def build_optimizer(
    model: nn.Module, config: OptimConfig, expert_group: str | None, rounding: int | None = None
) -> AveragedAdamW | Muon:
    """AdamW, or a Muon which has AdamW for the rest, still to be told where its matrices lie; with
    a moving average of what they move if optim.ema_decay asks for one.

    rounding: seed of an AdamW on masters of bf16, to be told where its parameters lie; None: fp32.
    """
    groups = parameter_groups(model, config, expert_group)
    fused = torch.cuda.is_available()
    optimizer: AveragedAdamW | Muon
    if rounding is not None:
        optimizer = RoundedAdamW(groups, config, rounding)
    elif config.uses_muon:
        optimizer = Muon(groups, config, fused)
    else:
        optimizer = AveragedAdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=fused,
        )
    if config.ema_decay is not None:
        optimizer.average = MovingAverage(config.ema_decay)
    return optimizer
