"""Time and memory of a call on the GPU, what the GPU could do at best, and what a figure means nothing without."""

import datetime
import statistics
import subprocess

import torch

__all__ = ["copy_bandwidth", "describe", "milliseconds", "peak_bytes", "replayed"]

SECONDS = 0.3  # of measuring, and a third of it of warming up
CALLS = (10, 200)  # at least, at most


def _flusher():
    """A function that pushes everything else out of the L2 cache."""
    size = 2 * torch.cuda.get_device_properties("cuda").L2_cache_size
    return torch.empty(max(size, 1 << 20), dtype=torch.int8, device="cuda").zero_


def milliseconds(call):
    """Median over calls that each find the L2 cache cold, by CUDA events."""
    flush = _flusher()
    call()  # compiles, tunes
    call()
    timed = _timed(call, flush, 3)
    calls = max(CALLS[0], min(CALLS[1], int(1e3 * SECONDS / max(statistics.median(timed), 1e-3))))
    _timed(call, flush, calls // 3)
    return statistics.median(_timed(call, flush, calls))


def _timed(call, flush, calls):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        flush()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def replayed(call):
    """The call as a CUDA graph: for work so short that starting it from Python takes longer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is tuned or allocated at first must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call):
    """Of memory above what is allocated before the call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth():
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * milliseconds(lambda: target.copy_(source)))


def describe(device):
    """Date, device and versions. device: "cuda" or "cpu"."""
    found = {"date": datetime.date.today().isoformat(), "device": device}
    if device == "cuda":
        import triton

        found["device"] = torch.cuda.get_device_name()
        if torch.version.hip is None:
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            try:
                found["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
            except (OSError, subprocess.CalledProcessError):
                found["driver"] = "unknown"
        found |= {"runtime": torch.version.hip or torch.version.cuda, "triton": triton.__version__}
    return found | {"torch": torch.__version__}
