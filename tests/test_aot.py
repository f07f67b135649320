"""The kernels' machine code for GPUs that are not here, by benchmarks/aot.py: spills, memory, tensor cores.

In processes of its own: the other tests interpret the kernels, and Triton cannot do both in one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).parents[1] / "benchmarks" / "aot.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of a thread that still spill, by target, head size and kernel, in bf16 with or without raw gates, or in fp32.
OPEN = {}
CHUNK_KERNELS = {"prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel"}


def compiled(*options):
    """The reports of the chosen cases: at least one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AOT), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    return reports


def place(report):
    return report["target"], report["size"], report["kernel"]


def assert_faultless(reports):
    """But for the spills of OPEN, which may not grow, and leave the list when they are gone."""
    wrong, most = [], {}
    for report in reports:
        only_spills = all(fault.startswith("spills ") for fault in report["faults"])
        if report["faults"] and not (only_spills and report["spilled"] <= OPEN.get(place(report), 0)):
            wrong.append("{target} {op} {kind} {size} {options}: {kernel} {config} {faults}".format(**report))
        most[place(report)] = max(most.get(place(report), 0), report["spilled"])
    wrong += [f"{case} no longer spills: off the list" for case in most if case in OPEN and not most[case]]
    assert not wrong, "\n".join(wrong)


def assert_hopper_uses_wgmma(reports):
    """Not in prepare_kernel, whose products are of fewer rows than the 64 that wgmma takes."""
    for report in reports:
        if report["target"] == "sm_90" and report["op"] == "chunk" and report["kind"] != "fp32":
            assert report["matrix"].get("HGMMA") or report["kernel"] == "prepare_kernel", report


def test_what_training_runs_on_hopper_does_not_spill_fits_and_uses_wgmma():
    reports = compiled("--target", "sm_90", "--op", "chunk", "--kind", "bf16", "--size", "128", "--options", "plain")
    assert {report["kernel"] for report in reports} == CHUNK_KERNELS
    assert_faultless(reports)
    assert_hopper_uses_wgmma(reports)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_but_the_listed_spills_and_none_outgrows_the_target_or_multiplies_without_tensor_cores(target):
    """All of bf16, and fp32 at K = V = 128; the rest of fp32, which takes long, only in benchmarks/aot_report.py."""
    half = compiled("--target", target, "--kind", "bf16", "bf16 raw")
    single = compiled("--target", target, "--kind", "fp32", "--size", "128")
    assert_faultless(half + single)
    assert_hopper_uses_wgmma(half)
    assert {report["size"] for report in half if report["op"] == "chunk"} == {64, 128, 256}


def test_a_configuration_that_spills_is_found_out():
    reports = compiled("--target", "sm_90", "--op", "decode", "--kind", "bf16", "--size", "256",
                       "--set", "num_warps=1")  # fmt: skip
    assert any("spills" in fault for report in reports for fault in report["faults"])
