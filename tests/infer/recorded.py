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

READS = {"item", "tolist", "cpu", "numpy", "__array__", "__contains__", "__bool__", "__int__"} | {
    *("__float__", "__index__", "__complex__")
}
"""Methods of a tensor by which its numbers get to the host."""
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere"),
    *("masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
"""Operators that wait for the device, or whose shapes hang on numbers there."""
FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy", "lift"}
"""torch.tensor of a list: a copy of memory that is gone when a graph replays."""
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
CHECKS = {("interface.py", "_check")}
"""(file, function) of ours that look at numbers of tensors on a CPU, and at none on a GPU."""


class Broken(AssertionError):
    """Something that a graph cannot hold."""


def _is_a_check() -> bool:
    """Whether one of CHECKS is what has called an operator or method."""
    frame = sys._getframe(2)
    for _ in range(8):
        if (Path(frame.f_code.co_filename).name, frame.f_code.co_name) in CHECKS:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class _Methods(TorchFunctionMode):
    """`tolist` of a tensor on a CPU calls no operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and not _is_a_check():
            raise Broken(f"{func.__name__} reads numbers of a tensor on the host")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Sees every operator. tape: takes what does it again; None: nobody keeps it."""

    def __init__(self, tape: list[Callable[[], None]] | None):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS | FROM_THE_HOST and not _is_a_check():
            raise Broken(f"{name} is none that a graph can hold")
        sizes_itself = name == "repeat_interleave" and func._overloadname == "Tensor"
        if sizes_itself and kwargs.get("output_size") is None:
            raise Broken(f"{name} by a tensor asks the device for a size")
        places = args[1] if name in BY_INDEX else ()
        if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in places):
            raise Broken(f"{name} by a mask has a shape that hangs on numbers")

        out = func(*args, **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        devices = {t.device for t in (*given, *outs) if t.dim()}
        if len(devices) > 1:
            raise Broken(f"{name} moves numbers between devices")
        if self.tape is not None:
            self.tape.append(lambda: _do_again(func, args, kwargs, outs))
        return out


def _do_again(func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
    """The operator once more, on the same memory; what it makes goes where it went."""
    found = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
    for new, place in zip(found, outs, strict=True):
        assert new.shape == place.shape
        if new.data_ptr() != place.data_ptr():  # else a view, or what was written in place
            place.copy_(new)


class Guard:
    """While it is entered nothing reads a tensor on the host, has a shape that hangs on numbers, or
    comes from another device. Inside an operator of ours it does not look.
    """

    def __init__(self, tape: list[Callable[[], None]] | None = None):
        self._tape, self._stack = tape, ExitStack()

    def __enter__(self) -> Guard:
        self._stack.enter_context(_Methods())
        self._stack.enter_context(_Operators(self._tape))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class Recorder:
    """infer.graphs.capture.Capture on any device: what a replay does hangs on nothing but the
    numbers in memory, as no line of Python between the operators is run again.

    Attributes:
        tapes: lengths of what was recorded; replays: of all of them.
    """

    def __init__(self) -> None:
        self.tapes: list[int] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        tape: list[Callable[[], None]] = []
        with Guard(tape):
            run()
        self.tapes.append(len(tape))

        def replay() -> None:
            self.replays += 1
            for operator in tape:
                operator()

        return replay
