"""What stands in for CUDA graphs on a CPU: a guard that lets nothing pass which a capture cannot
hold, and a tape of the operators that were called, which replays them on the memory that they had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_READS = {"item", "tolist", "cpu", "numpy", "cuda", "to_dense", "__bool__", "__int__"} | {
    *("__float__", "__index__", "__complex__", "__contains__", "__array__", "__len__of_data")
}
"""Methods of a tensor by which its values get to the host."""
DATA_DEPENDENT = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select"),
    *("aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::is_nonzero"),
    *("aten::equal", "aten::bincount", "aten::histc", "aten::argwhere", "aten::item"),
}
"""Operators that wait for the device, or whose shapes hang on numbers there."""
FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift"}
"""torch.tensor of a list: a copy from memory of the host, which is gone when a graph replays."""


CHECKS = {("interface.py", "_check"), ("interface.py", "group_by_expert")}
"""(file, function) of ours that look at numbers of a tensor on a CPU, and at none on a GPU."""


class Broken(AssertionError):
    """Something that a graph cannot hold."""


def _checks() -> bool:
    """Whether one of CHECKS is what called."""
    frame = sys._getframe(2)
    for _ in range(8):
        file = frame.f_code.co_filename
        if (Path(file).name, frame.f_code.co_name) in CHECKS:
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


class _NoReads(TorchFunctionMode):
    """tolist of a tensor on a CPU calls no operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in HOST_READS and not _checks():
            raise Broken(f"{func.__name__} reads numbers of a tensor on the host")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Sees every operator, and keeps it where there is a tape."""

    def __init__(self, tape: list[Callable[[], None]] | None = None):
        super().__init__()
        self.tape = tape
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self.names.append(name)
        if name in DATA_DEPENDENT | FROM_THE_HOST and not _checks():
            raise Broken(f"{name} is none that a graph can hold")
        if name == "aten::repeat_interleave" and func._overloadname == "Tensor":
            if kwargs.get("output_size") is None:
                raise Broken(f"{name} without output_size asks the device for a size")
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
                raise Broken(f"{name} by a mask has a shape that hangs on numbers")
        out = func(*args, **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        devices = {t.device for t in (*tensors, *outs) if t.dim()}
        if len(devices) > 1:
            raise Broken(f"{name} moves between {devices}")
        if self.tape is not None:
            self.tape.append(lambda: _again(func, args, kwargs, outs))
        return out


def _again(func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
    """The operator once more; what it makes goes where it went."""
    found = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
    for new, place in zip(found, outs, strict=True):
        assert new.shape == place.shape, "a shape hangs on numbers"
        if new.data_ptr() != place.data_ptr() or new.stride() != place.stride():
            place.copy_(new)


class Guard:
    """No host reads, no shapes that hang on numbers, no other device, while it is entered."""

    def __init__(self, tape: list[Callable[[], None]] | None = None):
        self.operators = _Operators(tape)

    def __enter__(self) -> Guard:
        self._stack = ExitStack()
        self._stack.enter_context(_NoReads())
        self._stack.enter_context(self.operators)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
