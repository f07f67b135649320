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
# Bytes of a thread that still spill, by target, head size and kernel, in bf16 with or without raw gates.
OPEN = {
    ("gfx942", 256, "scan_kernel"): 200,
    ("sm_100", 128, "gradient_kernel"): 32,
    ("sm_100", 128, "reverse_kernel"): 16,
    ("sm_100", 128, "scan_kernel"): 24,
    ("sm_100", 256, "gradient_kernel"): 168,
    ("sm_100", 256, "reverse_kernel"): 200,
    ("sm_100", 256, "scan_kernel"): 336,
    ("sm_100", 64, "gradient_kernel"): 176,
    ("sm_100", 256, "recurrent_kernel"): 8,
    ("sm_80", 128, "gradient_kernel"): 8,
    ("sm_80", 128, "reverse_kernel"): 24,
    ("sm_80", 256, "gradient_kernel"): 40,
    ("sm_80", 256, "scan_kernel"): 184,
    ("sm_80", 64, "gradient_kernel"): 56,
    ("sm_80", 128, "recurrent_kernel"): 24,
    ("sm_90", 128, "gradient_kernel"): 32,
    ("sm_90", 256, "gradient_kernel"): 144,
    ("sm_90", 256, "reverse_kernel"): 1224,
    ("sm_90", 256, "scan_kernel"): 776,
    ("sm_90", 64, "gradient_kernel"): 152,
}
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
    """But for the spills of OPEN, which may not grow."""
    wrong = []
    for report in reports:
        only_spills = all(fault.startswith("spills ") for fault in report["faults"])
        if report["faults"] and not (only_spills and report["spilled"] <= OPEN.get(place(report), 0)):
            wrong.append("{target} {op} {kind} {size} {options}: {kernel} {config} {faults}".format(**report))
    assert not wrong, "\n".join(wrong)


def assert_hopper_uses_wgmma(reports):
    """Not in prepare_kernel, whose products are of fewer rows than the 64 that wgmma takes."""
    for report in reports:
        if report["target"] == "sm_90" and report["op"] == "chunk" and report["kind"] != "fp32":
            assert report["matrix"].get("HGMMA") or report["kernel"] == "prepare_kernel", report


def test_what_training_runs_on_hopper_does_not_spill_fits_and_uses_wgmma():
    reports = compiled("--target", "sm_90", "--op", "chunk", "--kind", "bf16", "--size", "128", "--options", "plain")
    assert {report["kernel"] for report in reports} == CHUNK_KERNELS
    assert not any(report["faults"] for report in reports)
    assert_hopper_uses_wgmma(reports)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_but_the_listed_spills_and_none_outgrows_the_target_or_multiplies_without_tensor_cores(target):
    """In bf16; fp32, which takes long, only in benchmarks/aot_report.py."""
    reports = compiled("--target", target, "--kind", "bf16", "bf16 raw")
    assert_faultless(reports)
    assert_hopper_uses_wgmma(reports)
    assert {report["size"] for report in reports if report["op"] == "chunk"} == {64, 128, 256}
    spilling = {place(report) for report in reports if report["spilled"]}
    assert {case for case in OPEN if case[0] == target} == spilling  # what no longer spills leaves the list


def test_a_configuration_that_spills_is_found_out():
    reports = compiled("--target", "sm_90", "--op", "decode", "--kind", "bf16", "--size", "256",
                       "--set", "num_warps=1")  # fmt: skip
    assert any("spills" in fault for report in reports for fault in report["faults"])
