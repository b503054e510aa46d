"""Faults in training ranks without a hook in production code: python imports this file at start
when it is on PYTHONPATH.

    LOADSTONE_FAULT="kill@1:7"           rank 1 dies of SIGKILL at its first heartbeat of step 7
                                         (counted from 1)
    LOADSTONE_FAULT="kill@1:8:save"      ... when it begins to save in step 8 or later
    LOADSTONE_FAULT="kill@1:8:backward#3"  ... when it begins the third backward pass of the step
    LOADSTONE_FAULT="kill@1:5;hang@0:9"  several, each happens once
    LOADSTONE_FAULT="kill!@1:7"          at every start again
    LOADSTONE_FAULT="scarce@0:1:forward" rank 0 gets no more than LOADSTONE_SPARE_MIB beside what it
                                         has mapped by then (rank -1: a process without a launcher)
    LOADSTONE_FAULT_DIR=FOLDER           a fault that has happened is recorded here, with its time,
                                         before it strikes
    LOADSTONE_PACE=0.3                   every rank rests so long before each step, so that faults
                                         from outside can hit it
    LOADSTONE_PHASES=FOLDER              every rank writes "STEP PHASE" to FOLDER/RANK at each
                                         heartbeat, and rests for LOADSTONE_LINGER seconds, so that
                                         faults from outside can choose a phase

Kinds: the functions of ACTIONS below happen at a heartbeat; nan_loss spoils the loss of its step,
nan_grad and nan_expert one gradient; slow and slow_data make a straggler, whose forward passes or
reading take longer from its step on; clock sets one rank's wall clock an hour ahead.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SLOW_SECONDS = 0.25
PASSIVE = ("nan_loss", "nan_grad", "nan_expert", "slow", "slow_data")
real_time = time.time
step_now = 0


class Fault:
    """kind[!]@rank:step[:phase[#number]]"""

    def __init__(self, text):
        self.text = text
        kind, place = text.split("@")
        rank, step, *phase = place.split(":")
        self.kind, self.again = kind.rstrip("!"), kind.endswith("!")
        name, _, number = (phase[0] if phase else "").partition("#")
        self.rank, self.step, self.phase = int(rank), int(step), name or None
        self.number = int(number or 1)
        self.seen, self.seen_in = 0, None
        self.struck = False

    def due(self, step, phase):
        if self.struck or step < self.step or self.phase not in (None, phase):
            return False
        self.seen, self.seen_in = (self.seen + 1 if self.seen_in == step else 1), step
        return self.seen == self.number

    def record(self, step, phase):
        """Write down that the fault happens now; False: it has happened in an earlier attempt."""
        self.struck = True
        name = "".join(c if c.isalnum() else "-" for c in self.text) + (
            f"-{real_time():.3f}" if self.again else ""
        )
        path = os.path.join(os.environ["LOADSTONE_FAULT_DIR"], f"{name}.json")
        fact = {
            "fault": self.text,
            "kind": self.kind,
            "rank": self.rank,
            "host": socket.gethostname(),
            "step": step,
            "phase": phase,
            "time": real_time(),
            "pid": os.getpid(),
        }
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL), "w") as file:
                file.write(json.dumps(fact))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True


def hang():
    while True:
        time.sleep(3600)


def spin():
    while True:
        pass


def fail():
    raise RuntimeError("injected fault")


def clock():
    time.time = lambda: real_time() + 3600.0


def scarce():
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limit = mapped + int(float(os.environ["LOADSTONE_SPARE_MIB"]) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "oom": lambda: os.kill(os.getpid(), signal.SIGKILL),  # what the kernel sends
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": hang,
    "spin": spin,
    "exit0": lambda: os._exit(0),
    "exit3": lambda: os._exit(3),
    "raise": fail,
    "clock": clock,
    "scarce": scarce,
}


def patch_heartbeat(module, faults, pace):
    beat = module.beat
    phases, linger = (
        os.environ.get("LOADSTONE_PHASES"),
        float(os.environ.get("LOADSTONE_LINGER", "0")),
    )

    def beat_and_break(step, phase):
        global step_now
        beat(step, phase)
        if phases:
            note(phases, step, phase)
            time.sleep(linger)
        if phase == "data":
            step_now = step
            time.sleep(pace)
        for fault in faults:
            if fault.kind not in PASSIVE and fault.due(step, phase) and fault.record(step, phase):
                ACTIONS[fault.kind]()

    module.beat = beat_and_break


def note(folder, step, phase):
    path = os.path.join(folder, os.environ["RANK"])
    with open(path + ".tmp", "w") as file:
        file.write(f"{step} {phase}")
    os.replace(path + ".tmp", path)


def patch_engine(module, faults):
    forward, backward = module.Engine.forward, module.Engine.backward

    def due(*kinds):
        return any(
            f.kind in kinds and f.due(step_now, None) and f.record(step_now, f.kind) for f in faults
        )

    def spoiled_forward(self, *given):
        drag(faults, "slow", "forward")
        output = forward(self, *given)
        return (
            output._replace(loss_sum=output.loss_sum * float("nan")) if due("nan_loss") else output
        )

    def spoiled_backward(self, *given):
        if due("nan_grad"):
            poison_gradient(self.module, expert=False)
        if due("nan_expert"):
            poison_gradient(self.module, expert=True)
        return backward(self, *given)

    module.Engine.forward, module.Engine.backward = spoiled_forward, spoiled_backward


def patch_loader(module, faults):
    next_step = module.TrainingLoader.next_step

    def slow_next_step(self, *arguments):
        drag(faults, "slow_data", "data")
        return next_step(self, *arguments)

    module.TrainingLoader.next_step = slow_next_step


def drag(faults, kind, phase):
    for fault in faults:
        if fault.kind == kind and step_now >= fault.step:
            if not fault.struck:
                fault.record(step_now, phase)
            time.sleep(SLOW_SECONDS)


def poison_gradient(model, expert):
    """The next gradient of one dense or one expert parameter gets a NaN in its first place."""
    parameter = next(
        p for p in model.parameters() if p.requires_grad and getattr(p, "allreduce", True) != expert
    )

    def poison(gradient):
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[0] = float("nan")
        return gradient

    handle = parameter.register_hook(poison)


class Patcher(importlib.abc.MetaPathFinder):
    """Finds the modules to break as usual, and breaks them after they were loaded."""

    def __init__(self, patches):
        self.patches = patches

    def find_spec(self, name, path=None, target=None):
        if name not in self.patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load, patch = spec.loader.exec_module, self.patches[name]

        def load_and_patch(module):
            load(module)
            patch(module)

        spec.loader.exec_module = load_and_patch
        return spec


def install():
    rank = int(os.environ.get("RANK", "-1"))
    faults = [Fault(text) for text in os.environ.get("LOADSTONE_FAULT", "").split(";") if text]
    faults = [fault for fault in faults if fault.rank == rank]
    pace = float(os.environ.get("LOADSTONE_PACE", "0"))
    if faults or pace or (rank >= 0 and "LOADSTONE_PHASES" in os.environ):
        sys.meta_path.insert(
            0,
            Patcher(
                {
                    "train.rank.heartbeat": lambda module: patch_heartbeat(module, faults, pace),
                    "train.engine.deepspeed": lambda module: patch_engine(module, faults),
                    "train.data.loader": lambda module: patch_loader(module, faults),
                }
            ),
        )


def run_the_other_sitecustomize():
    """The environment may have one of its own, which this file hides."""
    for folder in sys.path:
        path = os.path.join(folder, "sitecustomize.py")
        if os.path.abspath(folder) != HERE and os.path.isfile(path):
            spec = importlib.util.spec_from_file_location("_other_sitecustomize", path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


run_the_other_sitecustomize()
install()
