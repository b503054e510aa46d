"""Which rank of the expert group serves which expert, as a record and a file. Made by
model/placement/planner.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class LayerPlacement:
    """The experts of one MoE layer on R ranks, L = E / R of them owned by each."""

    experts: tuple[int, ...]
    """[E] the expert at each position; rank r owns positions r * L .. (r + 1) * L - 1."""
    replicas: tuple[tuple[int, ...], ...]
    """By rank the experts it serves besides its own, with weights lent by their owners; as many on
    every rank.
    """

    def owner(self, expert: int) -> int:
        return self.experts.index(expert) // (len(self.experts) // len(self.replicas))

    def ranks_of(self, expert: int) -> tuple[int, ...]:
        """Every rank that serves the expert: its owner, then the others in order."""
        return (
            self.owner(expert),
            *(rank for rank, lent in enumerate(self.replicas) if expert in lent),
        )

    @staticmethod
    def identity(num_experts: int, ranks: int) -> LayerPlacement:
        """Consecutive blocks, nothing lent: what runs without a placement.

        Raises:
            ValueError: the experts cannot be shared out evenly.
        """
        if ranks < 1 or num_experts % ranks:
            raise ValueError(
                f"num_experts {num_experts} is not divisible by expert_parallel_size {ranks}"
            )
        return LayerPlacement(tuple(range(num_experts)), ((),) * ranks)

    def problem(self) -> str | None:
        """The first contradiction within the layer."""
        num_experts, ranks = len(self.experts), len(self.replicas)
        if ranks < 1 or num_experts < 1 or num_experts % ranks:
            return f"has {num_experts} experts for {ranks} ranks, which cannot be shared out evenly"
        strange = next((e for e in self.experts if not 0 <= e < num_experts), None)
        if strange is not None:
            return f"places expert {strange}; its experts are 0 to {num_experts - 1}"
        if len(set(self.experts)) < num_experts:
            missing = min(set(range(num_experts)) - set(self.experts))
            return f"has no owner for expert {missing}, and several for another"
        own = num_experts // ranks
        for rank, lent in enumerate(self.replicas):
            if len(lent) != len(self.replicas[0]):
                return (
                    f"lends {len(lent)} experts to rank {rank} but {len(self.replicas[0])} to rank "
                    "0; ranks get equally many"
                )
            strange = next((e for e in lent if not 0 <= e < num_experts), None)
            if strange is not None:
                return (
                    f"lends expert {strange} to rank {rank}; its experts are 0 to {num_experts - 1}"
                )
            if len(set(lent)) < len(lent):
                return f"lends an expert to rank {rank} twice: {list(lent)}"
            owned = set(self.experts[rank * own : (rank + 1) * own]) & set(lent)
            if owned:
                return f"lends expert {min(owned)} to rank {rank}, which owns it"
        return None


@dataclass(frozen=True)
class Placement:
    expert_parallel_size: int
    layers: tuple[LayerPlacement, ...]
    """One per MoE layer, in layer order."""

    def problems(
        self, num_experts: int, num_moe_layers: int, expert_parallel_size: int
    ) -> list[str]:
        """Every contradiction with a run of these sizes, as sentences that name the value and the
        way out.
        """
        if expert_parallel_size == 1 < self.expert_parallel_size:
            return [
                f"parallel.placement is for expert_parallel_size {self.expert_parallel_size}, but "
                "one rank holds all experts (parallel.expert_parallel_size is 1); add "
                "parallel.placement=null"
            ]
        again = (
            f"add parallel.placement=null, or plan anew: python -m launch.place run=DIR "
            f"expert_parallel_size={expert_parallel_size}"
        )
        found = []
        if self.expert_parallel_size != expert_parallel_size:
            found.append(
                f"parallel.placement is for expert_parallel_size {self.expert_parallel_size}, but "
                f"parallel.expert_parallel_size is {expert_parallel_size}; {again}"
            )
        if len(self.layers) != num_moe_layers:
            found.append(
                f"parallel.placement has {len(self.layers)} layers, but the model has "
                f"{num_moe_layers} with experts; {again}"
            )
        sizes = sorted({len(layer.experts) for layer in self.layers} - {num_experts})
        if sizes:
            found.append(
                f"parallel.placement places {sizes[0]} experts, but model.num_experts is "
                f"{num_experts}; {again}"
            )
        if found:
            return found
        for index, layer in enumerate(self.layers):
            problem = self._problem_of(layer)
            if problem is not None:
                found.append(f"parallel.placement: MoE layer {index} {problem}; {again}")
        return found

    def _problem_of(self, layer: LayerPlacement) -> str | None:
        if len(layer.replicas) != self.expert_parallel_size:
            return f"is for {len(layer.replicas)} ranks, not {self.expert_parallel_size}"
        return layer.problem()

    def save(self, path: Path) -> None:
        """Write the file as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        layers = ",\n".join(
            "  "
            + json.dumps({"experts": layer.experts, "replicas": layer.replicas}, allow_nan=False)
            for layer in self.layers
        )
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(
            f'{{"format": {FORMAT}, "expert_parallel_size": {self.expert_parallel_size}, "layers": '
            "[\n"
            f"{layers}\n]}}\n"
        )
        scratch.replace(path)

    @staticmethod
    def load(path: Path) -> Placement:
        """What `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        hint = "python -m launch.place run=DIR writes one"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); {hint}") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is no placement: it holds no JSON; {hint}") from None
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError(f"{path} is no placement; {hint}")
        if data["format"] != FORMAT or isinstance(data["format"], bool):
            raise ValueError(
                f"{path} has format {str(data['format'])[:20]!r}; this version reads format "
                f"{FORMAT}"
            )
        size, layers = data.get("expert_parallel_size"), data.get("layers")
        if (
            not isinstance(size, int)
            or isinstance(size, bool)
            or not isinstance(layers, list)
            or not all(map(_is_layer, layers))
        ):
            raise ValueError(
                f"{path} is damaged: expert_parallel_size must be a number and layers a list of "
                "experts and replicas, lists of numbers; plan anew with python -m launch.place "
                "run=DIR"
            )
        placement = Placement(
            size,
            tuple(
                LayerPlacement(tuple(layer["experts"]), tuple(map(tuple, layer["replicas"])))
                for layer in layers
            ),
        )
        for index, layer in enumerate(placement.layers):
            problem = placement._problem_of(layer)
            if problem is not None:
                raise ValueError(
                    f"{path} is damaged: MoE layer {index} {problem}; plan anew with python -m "
                    "launch.place run=DIR"
                )
        return placement


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_layer(value: Any) -> bool:
    def numbers(items: Any) -> bool:
        return isinstance(items, list) and all(map(_is_int, items))

    return (
        isinstance(value, dict)
        and numbers(value.get("experts"))
        and isinstance(value.get("replicas"), list)
        and all(map(numbers, value["replicas"]))
    )
