"""One processor of an H100 running programs, in C: see simulator.c."""

import ctypes
import functools
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from . import machine

__all__ = ["RECORD", "WAITS", "simulate"]

SOURCE = Path(__file__).with_name("simulator.c")
RECORD = np.dtype(
    [(name, "u1") for name in ("pipe", "stall", "written", "read", "waits", "kind", "argument", "last")]
    + [(name, "u2") for name in ("pipe4", "memory4", "latency", "operand_latency", "l2", "hbm")]
)
# Where the time of warps goes, in the order of simulator.c.
WAITS = (
    "stall counts", "barriers", "loads from L2 or HBM", "loads from L1", "stores' operands", "copies' operands",
    "shared memory", "shuffles", "MUFU and conversions", "uniform registers", "other results",
    "shared stores' operands", "other operands", "copies to shared memory", "wgmma", "pipes and other warps",
)  # fmt: skip


@functools.cache
def _library():
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    with tempfile.TemporaryDirectory() as folder:  # a library stays loaded when its file is gone
        path = os.path.join(folder, "simulator.so")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", path, str(SOURCE), "-lm"], check=True)
        library = ctypes.CDLL(path)
    library.simulate.restype = ctypes.c_double
    return library


def simulate(
    streams: list[np.ndarray], resident: int, programs: int,
    l2: float = machine.L2 / machine.PROCESSORS / machine.CLOCK,
    hbm: float = machine.HBM / machine.PROCESSORS / machine.CLOCK,
) -> tuple[float, np.ndarray, np.ndarray]:  # fmt: skip
    """Clocks that one processor takes for ``programs``, ``resident`` at a time; when each of them ended [programs]; and
    the clocks that warps spent on each of ``WAITS``.

    streams: of each warp of a program what it issues, as RECORD. l2, hbm: bytes a clock for this processor, by default
    its share. Raises ValueError for more than 64 warps at once."""
    records = np.ascontiguousarray(np.concatenate(streams))
    lengths = np.array([len(stream) for stream in streams], np.int32)
    ends, waits = np.zeros(programs), np.zeros(len(WAITS))
    clocks = _library().simulate(
        records.ctypes.data_as(ctypes.c_void_p), lengths.ctypes.data_as(ctypes.c_void_p), len(streams), resident,
        programs, ctypes.c_double(l2), ctypes.c_double(hbm), ctypes.c_double(machine.LATENCY["wgmma"]),
        ends.ctypes.data_as(ctypes.c_void_p), waits.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    if clocks < 0:
        raise ValueError(f"{resident} programs of {len(streams)} warps at once are more than 64 warps")
    return clocks, np.sort(ends), waits
