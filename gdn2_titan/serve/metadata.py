"""What vLLM tells a GDN-2 layer of a step.

vLLM's base builder does what is needed: decodes first, a prompt's first piece never among them, also if it is of one
token, and persistent block indices for CUDA graphs. Not wanted of it is what its own convolution kernel reads; and
where it pads with its null block, which several rows then share, our operators want -1 and leave the row out.
"""

from dataclasses import dataclass, replace

from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID

__all__ = ["GDN2AttentionBackend"]


class GDN2AttentionBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "GDN2"

    @staticmethod
    def get_builder_cls() -> type["GDN2MetadataBuilder"]:
        return GDN2MetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


@dataclass
class GDN2Metadata(BaseMambaAttentionMetadata):
    """A ``steps.Step``."""


class GDN2MetadataBuilder(BaseMambaAttentionMetadataBuilder[GDN2Metadata]):
    metadata_cls = GDN2Metadata
    needs_causal_conv1d_metadata = False
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def _update_metadata_for_cudagraph_capture(self, metadata: GDN2Metadata) -> GDN2Metadata:
        metadata = super()._update_metadata_for_cudagraph_capture(metadata)
        blocks = metadata.state_indices_tensor_d
        if blocks is None:
            return metadata
        padded = blocks.masked_fill(blocks == NULL_BLOCK_ID, PAD_SLOT_ID)
        if blocks.data_ptr() == self.state_indices_tensor_d.data_ptr():
            blocks.copy_(padded)  # a graph reads it there
            return metadata
        return replace(metadata, state_indices_tensor_d=padded)  # ``blocks`` is vLLM's own table
