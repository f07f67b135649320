"""Compile, without a GPU or beside one, the kernels that check_gpu.py and op_gpu.py start, into a folder for Triton.

    python benchmarks/precompile.py --target sm_90 --out cache        # where there is time, and need be no GPU
    TRITON_CACHE_DIR=cache GDN2_TITAN_AUTOTUNE=0 python ...           # where there is none
    python benchmarks/precompile.py --target sm_90 --out cache        # again: counts what is found, compiles nothing
    python benchmarks/precompile.py --compare cache                   # once it was moved: mends its paths, and says
                                                                      # whether this Python's Triton will find it

Every call is recorded on CPU tensors, and every launch goes through Triton's own launch, up to the point where the
machine code would be loaded, under a driver that knows nothing but the target. So the key under which Triton looks for
the machine code is made of what it is made of on a GPU: the source of the kernel and of what it calls, with line
numbers, the dtypes and alignment of its arguments, constants, configuration, target, options, Triton's own files and
binary, the version of ptxas, and the environment variables that change code. Where any of these differs nothing is
found, and all is compiled again; ``--compare`` says what of Triton and the environment does. Torch, and where the
package lies, do not enter. Default configurations only: nothing is tuned.

Triton 3.6 also compiles a C function for each signature, with the compiler and libcuda of the machine. They are made
here too, against an empty libcuda, unless there is no C compiler.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

FACTS = "compiled_by.json"
LIBCUDA = "libcuda"  # a folder in that of the cache, while it is filled
THERE, COMPILED = "there", "compiled"
JOBS = {"a": "check_gpu", "b": "op_gpu"}  # stage of run_gpu.sh: the command whose calls it makes


def facts() -> dict[str, str]:
    """What the keys are made of besides a kernel and its arguments, and what travels with them."""
    import triton
    from triton.backends.nvidia import compiler
    from triton.compiler.compiler import get_cache_invalidating_env_vars
    from triton.runtime import cache

    triton_key = getattr(cache, "triton_key", None) or importlib.import_module("triton.compiler.compiler").triton_key
    version = compiler.get_ptxas_version(90)
    return {
        "triton": triton.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": hashlib.sha256(str(version).encode()).hexdigest(),
        "environment": json.dumps(sorted(get_cache_invalidating_env_vars().items())),
    }  # fmt: skip


def settle(folder: pathlib.Path) -> None:
    """Let Triton find a folder that was moved: it keeps whole paths of what belongs together."""
    for path in folder.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.resolve().parent / name) for name in names}}))


def _calls(stage):
    """Functions without arguments, each of which makes a call on CPU tensors and, if it has any, its gradients."""
    module = importlib.import_module(JOBS[stage])
    if stage == "a":
        yield from ((call.name, lambda call=call: module.results(call, "triton")) for call in module.calls("cpu"))
        return
    import torch

    def trained(name, inputs):
        def run():
            tree = module.CALLED[name](**inputs)
            outputs = [x for x in torch.utils._pytree.tree_leaves(tree) if x is not None and x.requires_grad]
            leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])

        return run

    for B, T in module.SHAPES:
        yield f"chunk_gdn2 {B} x {T}", lambda B=B, T=T: trained("chunk", module.shape_inputs(B, T, "cpu"))()
    for B in module.BATCHES:
        yield f"recurrent_gdn2_ {B}", lambda B=B: module.decode_step(**module.decode_inputs(B, "cpu"))
    yield "causal_conv1d_qkv", lambda: trained("conv", module.convolution_inputs(module.SHAPES[0][1], "cpu"))()


def _empty_libcuda(folder):
    """A library of libcuda's name in a folder, which C that calls it can be linked with, if there is a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is not None:
        folder.mkdir(exist_ok=True)
        options = ["-shared", "-o", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
        subprocess.run([compiler, *options], check=True)


def _driver(target, libcuda):
    """All that Triton asks of a driver up to the launch itself. Launchers are made, and never called."""
    from triton.backends.nvidia import driver as nvidia

    def launcher(src, metadata):
        if libcuda is not None and hasattr(nvidia, "make_launcher"):  # 3.6: C for each signature
            nvidia.CudaLauncher(src, metadata)
        return lambda *args: None

    utils = SimpleNamespace(
        load_binary=lambda *args: (None, None, 0, 0, 1024), unload_module=lambda *args: None,
        get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
    )  # fmt: skip
    return SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: "cpu", launcher_cls=launcher, utils=utils,
    )  # fmt: skip


def _unwritten(*shape, generator=None, device=None):
    import torch

    return torch.empty(*shape, device=device)


def run_stage(job: tuple[str, str, str, int, int]) -> list[tuple[str, str, str]]:
    """(call, kernel, "there", "compiled" or what went wrong) of a part of the launches. job: stage, target, folder
    of the cache, which part, of how many."""
    stage, name, folder, part, parts = job
    import torch
    import triton
    from aot import TARGETS
    from keys import settle_keys
    from launches import recorded

    settle_keys()  # as the commands do
    arch, target, _ = TARGETS[name]
    libcuda = pathlib.Path(folder, LIBCUDA, "libcuda.so.1")
    libcuda = libcuda if libcuda.exists() and target.backend == "cuda" else None
    if libcuda is not None:
        triton.knobs.nvidia.libcuda_path = str(libcuda.parent)
        ctypes.CDLL(str(libcuda), mode=ctypes.RTLD_GLOBAL)
        sys.setdlopenflags(os.RTLD_LAZY)  # launchers are loaded once they are made; what they call is not there
    triton.runtime.driver.set_active(_driver(target, libcuda))
    found, seen, count = [], set(), 0

    def listen(src, cache_hit, **others):
        found.append((call, src.name, THERE if cache_hit else COMPILED))

    def start(launch):
        nonlocal count
        config = launch.candidates[0]
        kinds = [
            (n, getattr(x, "dtype", x) if not isinstance(x, int) else (x % 16, x == 1)) for n, x in launch.args.items()
        ]
        key = (launch.name, str(kinds), str(launch.constants), str(config))
        if key in seen:
            return
        seen.add(key)
        count += 1
        if count % parts == part:
            try:
                launch.kernel[launch.grid](**launch.args, **launch.constants, **config)
            except Exception as error:  # a kernel that does not compile must not hide the others
                found.append((call, launch.name, f"{type(error).__name__}: {error}"))

    triton.knobs.compilation.listener = listen
    # The numbers do not matter, and most are never read: the memory is not even touched.
    empty = mock.patch.object(
        torch, "randn", lambda *shape, generator=None, device=None: torch.empty(*shape, device=device)
    )
    with empty, recorded(arch, start):
        for call, run in _calls(stage):
            run()
    return found


def precompile(stages: list[str], target: str, out: pathlib.Path, processes: int) -> list[str]:
    """What became of each kernel: "there", "compiled", or what went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    settle(out)
    _empty_libcuda(out / LIBCUDA)
    os.environ |= {"TRITON_CACHE_DIR": str(out.resolve()), "GDN2_TITAN_AUTOTUNE": "0"}
    jobs = [(stage, target, str(out), part, processes) for stage in stages for part in range(processes)]
    ends = []
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        for (stage, *_), found in zip(jobs, pool.map(run_stage, jobs), strict=True):
            for call, kernel, end in found:
                print(f"{stage}: {kernel} of {call}: {end}", flush=True)
                ends.append(end)
    shutil.rmtree(out / LIBCUDA, ignore_errors=True)
    (out / FACTS).write_text(json.dumps(facts(), indent=1))
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100", "sm_120"))
    parser.add_argument("--out", type=pathlib.Path, help="the folder, for TRITON_CACHE_DIR")
    parser.add_argument("--stages", nargs="+", choices=list(JOBS), default=list(JOBS), help="of run_gpu.sh")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--compare", type=pathlib.Path, help="a folder, with this Python's Triton; compiles nothing")
    chosen = parser.parse_args()
    if (chosen.out is None) == (chosen.compare is None):
        parser.error("either --out or --compare must be given")
    if chosen.compare is not None:
        settle(chosen.compare)
        written, here = json.loads((chosen.compare / FACTS).read_text()), facts()
        differ = [
            f"{name}: {written.get(name)} wrote it, here is {x}" for name, x in here.items() if x != written.get(name)
        ]
        print("\n".join(differ) or "The folder was written by this Triton: what was compiled is found.")
        raise SystemExit(bool(differ))
    begun = time.monotonic()
    ends = precompile(chosen.stages, chosen.target, chosen.out, chosen.processes)
    compiled, there = ends.count(COMPILED), ends.count(THERE)
    size = sum(path.stat().st_size for path in chosen.out.rglob("*") if path.is_file()) >> 20
    print(
        f"{compiled} kernels compiled, {there} were there; {size} MB, {time.monotonic() - begun:.0f} s", file=sys.stderr
    )


if __name__ == "__main__":
    main()
