"""The kernels' machine code for GPUs that are not here, by benchmarks/aot.py: spills, memory, tensor cores.

In processes of its own: the other tests interpret the kernels, and Triton cannot do both in one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gdn2_cases import slowly

AOT = Path(__file__).parents[1] / "benchmarks" / "aot.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CHUNK_KERNELS = {"prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel"}
SCANS = {"scan_kernel", "reverse_kernel", "segment_kernel"}


def compiled(*options):
    """The reports of the chosen cases: at least one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AOT), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    return reports


def assert_faultless(reports):
    line = "{target} {op} {kind} {size} {options}: {kernel} {config} {faults}"
    wrong = [line.format(**report) for report in reports if report["faults"]]
    assert not wrong, "\n".join(wrong)


def assert_hopper_uses_wgmma(reports):
    """Not in prepare_kernel, nor in the scans of a head of 256, of whose state a program has registers for 32 rows:
    wgmma takes products of no fewer than 64."""
    for report in reports:
        if report["target"] == "sm_90" and report["op"] in ("chunk", "segment") and report["kind"] != "fp32":
            few_rows = report["kernel"] == "prepare_kernel" or (report["kernel"] in SCANS and report["size"] == 256)
            assert report["matrix"].get("HGMMA") or few_rows, report


@pytest.mark.parametrize(
    "op, kernels", [("segment", {"prepare_kernel", "segment_kernel"}), *slowly(("chunk", CHUNK_KERNELS))]
)
def test_what_training_runs_on_hopper_does_not_spill_fits_and_uses_wgmma(op, kernels):
    reports = compiled("--target", "sm_90", "--op", op, "--kind", "bf16", "--size", "128", "--options", "plain")
    assert {report["kernel"] for report in reports} == kernels
    assert_faultless(reports)
    assert_hopper_uses_wgmma(reports)


@pytest.mark.slow
def test_fp32_fits_ampere_and_hopper():
    """It may spill: configurations.py says how much."""
    reports = compiled("--target", "sm_80", "sm_90", "--op", "chunk", "--kind", "fp32", "--size", "128",
                       "--options", "plain")  # fmt: skip
    found = {(report["target"], report["kernel"]) for report in reports}
    assert found == {(target, kernel) for target in ("sm_80", "sm_90") for kernel in CHUNK_KERNELS}
    for report in reports:
        report["faults"] = [fault for fault in report["faults"] if not fault.startswith("spills")]
    assert_faultless(reports)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_outgrows_the_target_or_multiplies_without_tensor_cores(target):
    """In bf16; fp32, which takes long, at all sizes and targets only by hand."""
    reports = compiled("--target", target, "--kind", "bf16", "bf16 raw")
    assert_faultless(reports)
    assert_hopper_uses_wgmma(reports)
    assert {report["size"] for report in reports if report["op"] == "chunk"} == {64, 128, 256}


@pytest.mark.slow
def test_a_configuration_that_spills_is_found_out():
    reports = compiled("--target", "sm_90", "--op", "decode", "--kind", "bf16", "--size", "256",
                       "--set", "num_warps=1")  # fmt: skip
    assert any("spills" in fault for report in reports for fault in report["faults"])
