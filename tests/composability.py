"""Which tests show that the mixer composes with which part of PyTorch; ``--composability FILE`` writes what they gave:
a table of what was run."""

import importlib.metadata
import platform

__all__ = ["FEATURES", "write_document"]

OP, LIBRARY, CONV = "test_gdn2_op.py", "test_gdn2_library.py", "test_causal_conv1d.py"
TRANSFORMS, LAYOUTS = "test_func_transforms.py", "distributed/test_layouts.py"
# Feature: tests, by file and by how the name begins.
FEATURES = {
    "gradcheck in fp64, states and grouped heads": [
        (OP, "test_gradients_pass_gradcheck_in_fp64"), (OP, "test_gradients_across_chunks_pass_gradcheck"),
        (CONV, "test_gradients_pass_gradcheck"),
    ],
    "opcheck of every op, absent arguments, permuted inputs": [
        (LIBRARY, "test_forward_ops_pass_opcheck"), (LIBRARY, "test_the_backward_op_passes_opcheck"),
        ("test_gdn2_inplace.py", "test_the_mutating_op_passes_opcheck"), (CONV, "test_forward_op_passes_opcheck"),
        (CONV, "test_backward_op_passes_opcheck"), (CONV, "test_both_ops_pass_opcheck"),
    ],
    "torch.compile(fullgraph=True) of the ops, any batch and length in one graph": [
        (LIBRARY, "test_compiled_equals_eager"), (LIBRARY, "test_compiled_with_batch_and_length"),
        (LIBRARY, "test_inductor_fuses"), (CONV, "test_compiles_without_graph_breaks"),
    ],
    "torch.compile(fullgraph=True) of blocks and models, marked sizes in one graph": [("test_compile.py", "test_")],
    "activation checkpointing: full, by layer, by op, memory budget": [
        (LIBRARY, "test_selective_checkpointing_that_names_the_op"), ("test_activation_checkpoint.py", "test_"),
        ("test_titan_activation_checkpoint.py", "test_"),
    ],
    "float8 and MXFP8 by torchao, emulated, compiled, gathered by FSDP2": [
        ("test_float8.py", "test_"), ("test_titan_float8.py", "test_"),
    ],
    "DTensor, sharded on batch or heads, eager, compiled and by local_map": [("test_dtensor.py", "test_")],
    "FSDP2, fp32 and bf16, compiled": [("test_fsdp.py", "test_")],
    "tensor and sequence parallelism, compiled, with FSDP2, in float8": [("test_tensor_parallel.py", "test_")],
    "FSDP2, HSDP, CP, TP, PP (1F1B, interleaved) and their products in TorchTitan": [
        (LAYOUTS, "test_a_layout_trains_as_one_process"),
    ],
    "the same with compiled blocks": [(LAYOUTS, "test_a_layout_trains_as_one_process_when_blocks_are_compiled")],
    "checkpoints that continue under another layout": [(LAYOUTS, "test_a_checkpoint_continues")],
    "context parallelism: the ops in 2 to 8 processes, compiled, checkpointed": [
        ("test_context_parallel.py", "test_"), ("test_context_parallel_conv.py", "test_"),
    ],
    "context parallelism: hybrid models, full, windowed and document attention, with TP": [
        ("test_context_parallel_attention.py", "test_"), ("test_context_parallel_model.py", "test_"),
    ],
    "a long sequence as segments on one device": [("test_segments.py", "test_"), ("test_segmented.py", "test_")],
    "padding and packing in transformers": [("test_hf_padding.py", "test_")],
    "transformers: quantized loading, heads, generate from embeddings": [
        ("test_hf_loading.py", "test_"), ("test_hf_names.py", "test_"),
    ],
    "PEFT: LoRA, DoRA, IA3": [("test_lora.py", "test_")],
    "torch.export, dynamic, saved and loaded": [
        (LIBRARY, "test_exports_with_dynamic"), (CONV, "test_exports_with_dynamic"),
        ("test_export.py", "test_an_exported_hybrid"),
    ],
    "AOTInductor": [("test_export.py", "test_a_hybrid_compiled_ahead_of_time")],
    "make_fx": [("test_export.py", "test_make_fx")],
    "autocast, eager as compiled": [
        (LIBRARY, "test_autocast_changes_nothing"), (CONV, "test_eager_and_compiled_agree_under_autocast"),
    ],
    "FlopCounterMode equals the closed form": [
        (LIBRARY, "test_flop_counter"), (CONV, "test_flop_counter"), ("test_gdn2_inplace.py", "test_flop_counter"),
    ],
    "torch.func.grad and vmap of it": [
        (TRANSFORMS, "test_func_grad"), (TRANSFORMS, "test_vmap"), (TRANSFORMS, "test_a_jacobian"),
    ],
    "forward mode and double backward raise": [
        (TRANSFORMS, "test_forward_mode"), (TRANSFORMS, "test_a_second_derivative"),
    ],
    "Triton kernels compiled for sm_80, sm_90, sm_100, gfx942": [("test_aot.py", "test_no_kernel")],
    "Triton kernels equal the definition in the interpreter": [
        ("test_triton_chunk.py", "test_"), ("test_triton_recurrent.py", "test_"), ("test_triton_conv.py", "test_"),
        ("test_triton_segment.py", "test_"), ("test_triton_fold.py", "test_"),
    ],
    "import without Triton, TorchTitan, transformers": [(LIBRARY, "test_importing")],
    "CUDA graphs, and no wait for the GPU": [
        ("test_gpu.py", "test_a_cuda_graph"), ("test_gpu.py", "test_forward_and_backward_with_resets_do_not_wait"),
    ],
}  # fmt: skip
PACKAGES = ("torch", "triton", "torchtitan", "torchao")


def write_document(path, cells):
    """The table of what FEATURES gave, {feature: cell}, as a document."""
    with_us = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    path.write_text("\n".join([
        "# What the mixer composes with", "",
        f"Written by the test suite: Python {platform.python_version()}, {with_us}, {platform.machine()}, by",
        "`./run_tests.sh --all --composability=docs/composability.md`. Which tests stand for which row:",
        "[tests/composability.py](../tests/composability.py).", "",
        "| with | tests |", "| --- | --- |", *(f"| {feature} | {cell} |" for feature, cell in cells.items()), "",
    ]))  # fmt: skip
