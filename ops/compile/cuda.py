"""Compiling kernels: lazily, once per content, shared by all ranks of a machine.

Libraries land in .cache/kernels (or $LOADSTONE_KERNELS) under a name that holds a hash of sources,
flags and compiler, so a stale one is never loaded; what the compiler said lies beside it, and its
checksum: a library that was cut short would end the process on a bus error, so it is built again.
Ranks that ask at the same time wait for the first. Loading a library runs it: only those of this
user are loaded.

    python -m ops.compile.cuda        # make compile-kernels
    python -m ops.compile.cuda 90a    # for one architecture, as make test does

compiles every CUDA kernel and tells registers, stack and spills.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger("loadstone")
ROOT = Path(__file__).resolve().parents[1]
CUDA_ARCHITECTURES = ("80", "90a", "100")


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message holds its output."""


def cache_folder() -> Path:
    return Path(os.environ.get("LOADSTONE_KERNELS", ROOT.parent / ".cache" / "kernels"))


def _cpu_flags(widest: bool = False) -> list[str]:
    """AVX2 and fused multiply-add where this machine has them; a shared cache keeps one build per
    choice. widest: also AVX-512, for code whose sums do not hang on a vector's width.
    """
    if platform.machine() == "x86_64":
        try:
            flags = Path("/proc/cpuinfo").read_text()
        except OSError:
            flags = ""
        wide = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
        if widest and all(f" {flag} " in flags for flag in wide):
            return ["-march=x86-64-v4", "-mprefer-vector-width=512"]
        if " avx2 " in flags and " fma " in flags and " bmi2 " in flags:
            return ["-march=x86-64-v3"]
    return []


def compile_library(name: str, sources: list[Path], command: list[str]) -> Path:
    """Run `command` + sources + "-o" + output unless the library is there already; returns its
    path.

    Raises:
        BuildError: the compiler is missing or failed.
    """
    compiler = shutil.which(command[0])
    if compiler is None:
        raise BuildError(f"{command[0]} is not installed")
    headers = sorted(
        {h for s in sources for h in (*s.parent.glob("*.h"), *(ROOT / "csrc").glob("*.h"))}
    )
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout)
    for file in (*sources, *headers):
        digest.update(file.read_bytes())
    folder = cache_folder()
    path = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if _is_whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(path):
            return path
        if path.exists():
            log.warning(
                "%s is not what was compiled (cut short or changed): it is built again", path
            )
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        log.info("compiling %s with %s, once for this machine: up to a minute", name, command[0])
        result = subprocess.run(
            [*command, *map(str, sources), "-o", str(scratch)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            scratch.unlink(missing_ok=True)
            raise BuildError(
                f"{command[0]} failed on "
                f"{', '.join(s.name for s in sources)}:\n{result.stderr[-4000:]}"
            )
        path.with_suffix(".log").write_text(result.stderr)
        path.with_suffix(".sha256").write_text(_checksum(scratch))
        scratch.replace(path)
    return path


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the library is there with the bytes that the compiler wrote.

    Raises:
        BuildError: another user owns or can write it, or the folder it is in.
    """
    for place in (path.parent, path):
        if not place.exists():
            return False
        require_own(place)
    try:
        return path.with_suffix(".sha256").read_text() == _checksum(path)
    except OSError:
        return False


def require_own(place: Path) -> None:
    """Raises BuildError where another user owns or can write a file or folder whose code runs
    here.
    """
    facts = place.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & stat.S_IWOTH:
        raise BuildError(
            f"{place} belongs to user {facts.st_uid} with mode "
            f"{stat.S_IMODE(facts.st_mode):o}, and a library in it would run as you; set "
            "LOADSTONE_KERNELS to a folder of your own"
        )


def build_ops(name: str, sources: list[Path], widest: bool = False) -> Path:
    """Dispatcher ops over torch's stable ABI, by g++ (or $CXX); widest: with the widest vectors."""
    package = Path(torch.__file__).parent
    include = package / "include"
    return compile_library(
        name,
        sources,
        [
            os.environ.get("CXX", "g++"),
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-shared",
            *_cpu_flags(widest),
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fno-trapping-math",
            f"-I{include}",
            f"-I{include / 'torch/csrc/api/include'}",
            f"-L{package / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch_cpu",
        ],
    )


def nvcc_command(architectures: tuple[str, ...], *flags: str) -> list[str]:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC",
        "-shared",
        "-fmad=false",
        "-lineinfo",
        "--extended-lambda",
        "--expt-relaxed-constexpr",
        "-cudart=static",
        "-Xptxas=-v",
        "-t",
        "2",
        *codes,
        *flags,
    ]


def build_cuda(name: str, sources: list[Path], architectures: tuple[str, ...]) -> Path:
    """Launchers with a plain C interface, by nvcc, for the given compute capabilities ("80",
    "90a").
    """
    return compile_library(name, sources, nvcc_command(architectures))


def build_cuda_on_cpu(name: str, sources: list[Path]) -> Path:
    """The same CUDA source as a CPU library (ops/csrc/cuda_on_cpu.h), for tests."""
    return compile_library(
        name,
        sources,
        [
            os.environ.get("CXX", "g++"),
            "-x",
            "c++",
            "-DLOADSTONE_CUDA_ON_CPU",
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            *_cpu_flags(),
            "-ffp-contract=off",
            "-fno-math-errno",
            "-w",
        ],
    )


def device_architecture() -> str:
    """The architecture to build for on this CUDA device: "80", "90a", "100"."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


class Resources(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread, for arrays that are indexed at run time
    spilled: int  # bytes of registers that were moved to memory


def resources(ptxas_output: str) -> dict[str, Resources]:
    """Mangled kernel name -> what it takes, of the output of nvcc -Xptxas=-v for one
    architecture.
    """
    found = {}
    for part in ptxas_output.split("Compiling entry function '")[1:]:
        # A function that is not inlined has lines of its own below its kernel's.
        def numbers(pattern: str, text: str = part) -> list[int]:
            return [int(n) for n in re.findall(pattern, text)]

        found[part[: part.index("'")]] = Resources(
            max(numbers(r"Used (\d+) registers")),
            max(numbers(r"(\d+) bytes stack")),
            sum(numbers(r"(\d+) bytes spill")),
        )
    return found


def _readable(names: list[str]) -> list[str]:
    """C++ names without namespace and arguments, by c++filt where there is one."""
    if shutil.which("c++filt"):
        names = subprocess.run(
            ["c++filt", "-p", *names], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    return [re.sub(r"^void |\w+::", "", name) for name in names]


def _compile(job: tuple[Path, str]) -> dict[str, Resources] | BuildError:
    source, architecture = job
    try:
        found = resources(
            build_cuda(f"{source.stem}_cuda", [source], (architecture,))
            .with_suffix(".log")
            .read_text()
        )
    except BuildError as error:
        return error
    return dict(zip(_readable(list(found)), found.values(), strict=True))


def main(arguments: list[str]) -> int:
    """Compile every .cu file for these architectures (none: all), two at a time, and report; 1 if
    one fails or a kernel spills.
    """
    unknown = sorted(set(arguments) - set(CUDA_ARCHITECTURES))
    if unknown:
        print(f"{', '.join(unknown)}: kernels are for {', '.join(CUDA_ARCHITECTURES)}")
        return 1
    architectures = tuple(arguments) or CUDA_ARCHITECTURES
    if shutil.which("nvcc") is None:
        print("nvcc is not installed: no CUDA kernel was compiled.")
        return 0
    sources = sorted({*ROOT.glob("**/csrc/*.cu"), *ROOT.glob("*/*.cu")})
    jobs = list(product(sources, architectures))
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(_compile, jobs), strict=True))
    failed = False
    for source in sources:
        print(
            f"{source.relative_to(ROOT.parent)}: registers + bytes of stack on "
            f"sm_{', sm_'.join(architectures)}"
        )
        rows: dict[str, str] = {}
        for architecture in architectures:
            result = results[source, architecture]
            if isinstance(result, BuildError):
                failed = True
                print(f"sm_{architecture}: {result}")
                continue
            for name, used in result.items():
                failed |= used.spilled > 0
                spilled = (
                    f" SPILLS {used.spilled} bytes on sm_{architecture}" if used.spilled else ""
                )
                rows[name] = (
                    rows.get(name, f"  {name:32}") + f"{used.registers:6} + {used.stack}{spilled}"
                )
        print("\n".join(rows[name] for name in sorted(rows)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
