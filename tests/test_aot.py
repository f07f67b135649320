"""The kernels' machine code for GPUs that are not here, by benchmarks/aot.py: memory, tensor cores, size.

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
KERNELS = AOT.parents[1] / "docs" / "kernels.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CHUNK_KERNELS = {"prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel"}
SCANS = {"scan_kernel", "reverse_kernel", "segment_kernel"}
MOST_CODE = 100  # KB on sm_90


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


def assert_hopper_uses_wgmma_and_little_code(reports):
    """No wgmma in the scans of a head of 256, of whose state a program has registers for 32 rows: it takes products of
    no fewer than 64."""
    for report in reports:
        if report["target"] == "sm_90" and report["op"] in ("chunk", "segment") and report["kind"] != "fp32":
            few_rows = report["kernel"] in SCANS and report["size"] == 256
            assert report["matrix"].get("HGMMA") or few_rows, report
            assert report["code"] <= 1024 * MOST_CODE, report


def documented():
    """{(GPU, kernel, inputs, configuration): KB of code, sorted} of the table in docs/kernels.md."""
    found = {}
    for line in KERNELS.read_text().split("<!-- kernels -->")[1].split("<!-- end of kernels -->")[0].splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) > 6 and cells[6].isdigit():
            found.setdefault(tuple(cells[:4]), []).append(int(cells[6]))
    return {key: sorted(code) for key, code in found.items()}


def assert_the_code_is_that_of_the_docs(reports):
    """To a tenth: with more, or in another configuration, the kernels are others than the page says."""
    found = {}
    for report in reports:
        if report["op"] in ("chunk", "segment", "fold", "recurrent", "decode") and report["options"] == "plain":
            config = ", ".join(f"{name} {value}" for name, value in report["config"].items())
            inputs = f"{report['op']}, {report['kind']}, {report['size']}"
            found.setdefault((report["target"], report["kernel"], inputs, config), []).append(report["code"] / 1024)
    table = documented()
    known = {key: sorted(code) for key, code in found.items() if key[2].endswith(", bf16 raw, 128")}
    assert known and known.keys() == {key for key in table if key[0] in {target for target, *_ in known}}
    for key, code in known.items():
        assert code == pytest.approx(table[key], rel=0.1, abs=1), f"{key}: aot.py --write again"


@pytest.mark.parametrize(
    "op, kind, kernels",
    [
        ("segment", "bf16", {"prepare_kernel", "segment_kernel"}),
        ("fold", "bf16 raw", {"fold_kernel"}),
        *slowly(("chunk", "bf16", CHUNK_KERNELS)),
    ],
)
def test_what_training_runs_on_hopper_fits_and_uses_wgmma(op, kind, kernels):
    reports = compiled("--target", "sm_90", "--op", op, "--kind", kind, "--size", "128", "--options", "plain")
    assert {report["kernel"] for report in reports} == kernels
    assert_faultless(reports)
    assert_hopper_uses_wgmma_and_little_code(reports)


@pytest.mark.slow
def test_fp32_fits_ampere_and_hopper():
    reports = compiled("--target", "sm_80", "sm_90", "--op", "chunk", "--kind", "fp32", "--size", "128",
                       "--options", "plain")  # fmt: skip
    found = {(report["target"], report["kernel"]) for report in reports}
    assert found == {(target, kernel) for target in ("sm_80", "sm_90") for kernel in CHUNK_KERNELS}
    assert_faultless(reports)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_outgrows_the_target_or_multiplies_without_tensor_cores(target):
    """In bf16, but for Hopper with the raw gates of training and without the heads that take least; the rest, which
    takes long, only by hand."""
    sizes = {64, 128, 256} if target == "sm_90" else {128, 256}
    if target == "sm_90":
        reports = compiled("--target", target, "--kind", "bf16", "bf16 raw")
    else:
        reports = compiled("--target", target, "--kind", "bf16 raw", "--size", *map(str, sizes))
        reports += compiled("--target", target, "--kind", "bf16", "--op", "conv", "conv_decode")
    assert_faultless(reports)
    assert_hopper_uses_wgmma_and_little_code(reports)
    assert_the_code_is_that_of_the_docs(reports)
    assert {report["size"] for report in reports if report["op"] == "chunk"} == sizes


@pytest.mark.slow
def test_a_configuration_that_outgrows_the_target_is_found_out():
    reports = compiled("--target", "sm_120", "--op", "chunk", "--kind", "bf16", "--size", "128", "--options", "plain",
                       "--set", "num_stages=4")  # fmt: skip
    assert any("shared memory" in fault for report in reports for fault in report["faults"])


# In a process of its own, which compiles what is there once.
VARIANTS = """
import collections, json, sys, torch
sys.path.insert(0, sys.argv[1])
from calls import gdn2_inputs
from launches import recorded
from aot import TARGETS, _compile
from gdn2_titan import ops
found = collections.defaultdict(set)
erase, segments, calls = json.loads(sys.argv[2])
for B, T, state, through, options in calls:
    inputs = gdn2_inputs("bf16 raw", B, T, 2, 64, 64, erases=erase, requires_grad=True, state=state, **options)
    if T % 2 and "cu_seqlens" in inputs:
        inputs["cu_seqlens"] = inputs["cu_seqlens"].int()
    with recorded(90) as launches:
        outputs = ops.chunk_gdn2(**inputs, backend="triton", num_segments=segments)
        if through:
            outputs = [outputs[i] for i in through]
            leaves = [x for x in inputs.values() if torch.is_tensor(x) and x.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs], allow_unused=True)
    for launch in launches:
        found[launch.name].add(_compile(launch, launch.candidates[0], TARGETS["sm_90"][1]).hash)
print(json.dumps({name.removesuffix("_kernel"): len(hashes) for name, hashes in found.items()}))
"""


def variants(*calls, erases=True, segments="auto"):
    """{kernel: how many compiled forms serve ``calls``}. A call: B, T, whether a state enters, which of its results a
    loss reads, and more arguments of ``gdn2_inputs``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS, AOT.parent, json.dumps([erases, segments, calls])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHAPES = ((1, 1), (1, 16), (1, 17), (1, 64), (1, 100), (1, 2048), (2, 4096), (1, 8192), (3, 333), (1, 4095))
SIX = {"prepare": 2, "scan": 2, "reverse": 1, "gradient": 1}  # of prepare and scan one forward and one in backward
NINE = SIX | {"segment": 1, "fold": 2}


@pytest.mark.slow
@pytest.mark.parametrize("segments, want", [(1, SIX), ("auto", NINE)])
@pytest.mark.parametrize("erases", [True, False])
def test_batches_and_lengths_of_any_size_are_served_by_six_compiled_kernels_and_three_of_segments(
    erases, segments, want
):
    assert variants(*((B, T, False, [0], {}) for B, T in SHAPES), erases=erases, segments=segments) == want


@pytest.mark.slow
def test_no_kernel_has_more_than_four_compiled_forms_whatever_a_process_calls():
    """Any batch and length, documents by resets, packed or both, a state that enters or not, a loss on either result or
    both, and no loss."""
    found = variants(
        *(
            (1 if packed else B, T, state, through, {"packed": packed, "resets": resets})
            for B, T in ((1, 100), (2, 333), (1, 4096))
            for state in (False, True)
            for through in ([], [0], [1], [0, 1])
            for packed in (False, True)
            for resets in (False, True)
            if state or 1 not in through
        )
    )
    # Prepare and scan forward and in backward, scan forward with and without a state; prepare, gradient and segment
    # with and without resets; reverse and gradient with and without a gradient of o.
    assert found == {"prepare": 4, "scan": 3, "reverse": 2, "gradient": 4, "segment": 2, "fold": 2}
