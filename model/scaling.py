"""What muP (`model.init=mup`) makes of first weights, learning rates and AdamW's epsilon as a model
grows wider and deeper than the one whose settings it takes over. Imports no torch.

m is hidden_size over that of the base, L the number of layers over that of the base; every other
width grows with hidden_size. By its role, a parameter has

    role     what it is                        std              AdamW lr   Muon lr      AdamW eps
    input    embedding, gains, biases          init_std         1          1            1 / m
    hidden   matrices between layers           init_std/sqrt(m) 1 / m      1 / sqrt(m)  1 / (m L)
    output   head, routers, the shared         init_std / m     1 / m      1 / m        1
             experts' gate

relative to the base, and its weight decay is divided by its factor on the learning rate, so that
their product stays. A tied embedding is an input whose logits are divided by m. Attention divides
logits by a head's dimension and no longer by its root where heads grow (mup_base_head_dim), and
what a layer adds to the residual stream is divided by L (mup_base_num_layers).

Sources: G. Yang et al., Tensor Programs V (arXiv 2203.03466), tables 3 and 8, for AdamW; G. Yang,
J. Simon, J. Bernstein, A Spectral Condition for Feature Learning (arXiv 2310.17813), for Muon: an
update of spectral norm 1 keeps its effect at any width, and one that is matched to AdamW's root
mean square has sqrt(max(rows, columns)) of it; J. Malasnicki et al., muP for Mixture of Experts
(arXiv 2508.09752), for routers as outputs and experts as hidden matrices; N. Dey et al., CompleteP
(arXiv 2505.01618), for depth, epsilon and weight decay.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from model.config import ModelConfig

Role = Literal["input", "hidden", "output"]
OUTPUTS = r"(^head|\.router|\.shared_gate)\.weight$"
"""Names of the matrices that read a whole width and write a number of values that does not grow."""
INSIDE = r"\.(attention|mlp)(_norm)?\."
"""Names of what stands between two places of the residual stream."""
INTO_RESIDUAL = r"(\.o_proj(\.weight)?|\.down(\.weight)?)$"


@dataclass(frozen=True)
class Factors:
    """On the settings of a parameter, relative to the base."""

    adamw_lr: float = 1.0
    muon_lr: float = 1.0
    adamw_eps: float = 1.0


PLAIN = Factors()


def role_of(name: str, is_matrix: bool) -> Role:
    """The role of a parameter. is_matrix: it has two dimensions, or three as a stack of experts."""
    if not is_matrix or name.startswith("embedding."):
        return "input"
    return "output" if re.search(OUTPUTS, name) else "hidden"


def factors_of(model: ModelConfig, name: str, is_matrix: bool) -> Factors:
    """On learning rates and epsilon of a parameter; all 1 unless model.init is mup."""
    if model.init != "mup":
        return PLAIN
    width, depth = model.width_ratio, model.depth_ratio
    role = role_of(name, is_matrix)
    if role == "output":
        return Factors(1 / width, 1 / width, 1.0)
    # Gradients of what lies before the head are as small as the head's weights are, and those
    # within a layer as small as its share of the residual stream.
    inside = depth if re.search(INSIDE, name) else 1.0
    eps = 1 / (width * inside)
    if role == "input":
        return Factors(1.0, 1.0, eps)
    return Factors(1 / width, 1 / math.sqrt(width), eps)


def first_std(model: ModelConfig, name: str) -> float:
    """Standard deviation of the first weights of a matrix, by model.init."""
    into_residual = re.search(INTO_RESIDUAL, name) is not None
    if model.init == "small":
        if into_residual:
            return 2 / (model.num_layers * math.sqrt(model.hidden_size))
        return math.sqrt(2 / (5 * model.hidden_size))
    std = model.init_std
    if model.init == "mup":
        role = role_of(name, True)
        std /= {"input": 1.0, "hidden": math.sqrt(model.width_ratio)}.get(role, model.width_ratio)
        # Where depth is scaled in the forward pass, weights have nothing to make up for.
        into_residual = into_residual and model.mup_base_num_layers is None
    if into_residual and model.init in ("depth_scaled", "mup"):
        std /= math.sqrt(2 * model.num_layers)
    return std
