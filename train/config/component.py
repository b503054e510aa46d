"""Components by name: the records that router, attention, dispatcher and objective may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.attention.config.base import AttentionConfig
from model.attention.config.kinds import ATTENTIONS
from model.component import Component
from model.dispatch.config import DISPATCHERS, DispatcherConfig
from model.routers.config import ROUTERS, RouterConfig
from train.config.objective import OBJECTIVES, ObjectiveConfig

KINDS: dict[type[Component], Mapping[str, type[Component]]] = {
    RouterConfig: ROUTERS,
    AttentionConfig: ATTENTIONS,
    DispatcherConfig: DISPATCHERS,
    ObjectiveConfig: OBJECTIVES,
}
"""What a setting of RunConfig may be -> name in a config -> record."""
SETTINGS = ("router", "attention", "dispatcher", "objective")
"""Settings of RunConfig that hold a component."""
FORMER = {
    "model.routers.top_k.TopKRouter": "top_k",
    "model.routers.top_p.TopPRouter": "top_p",
    "model.routers.threshold.ThresholdRouter": "threshold",
    "model.routers.relu.ReLURouter": "relu",
    "model.routers.expert_choice.ExpertChoiceRouter": "expert_choice",
    "model.routers.top_k.NullExpertsRouter": "null_experts",
    "model.attention.dense.DenseAttention": "dense",
    "model.attention.sparse.SparseAttention": "sparse",
    "model.dispatch.LocalDispatcher": "local",
    "model.dispatch.local.LocalDispatcher": "local",
    "model.dispatch.AllToAllDispatcher": "all_to_all",
    "model.dispatch.all_to_all.AllToAllDispatcher": "all_to_all",
}
"""`_target_` of a component in configs of earlier versions -> its name. Both are only compared,
never imported: a dotted path could execute anything.
"""


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a component with its name where an earlier version wrote `_target_`; those that
    no version wrote are left as they are.
    """
    name = FORMER.get(str(settings.get("_target_")))
    if name is None or "name" in settings:
        return dict(settings)
    return {"name": name} | {key: value for key, value in settings.items() if key != "_target_"}
