"""TorchTitan 0.2.2's llama3 with Gated DeltaNet-2 in every second layer. ``debug.toml`` names this module."""

from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama3.infra import parallelize as llama3
from torchtitan.models.llama3.model.model import Transformer, TransformerBlock
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.parallel import SAVED_OPS, apply_mixer_tensor_parallel, shard_decays
from gdn2_titan.titan import settle_device
from gdn2_titan.titan.dataloader import build_dataloader
from gdn2_titan.titan.v02.components import build_optimizers


class GDN2Block(TransformerBlock):
    def __init__(self, layer_id, args):
        super().__init__(layer_id, args)
        del self.attention  # not renamed: TorchTitan's tensor-parallel plan would shard what bears that name
        self.mixer = GatedDeltaNet2(args.dim, args.n_heads, args.dim // args.n_heads, norm_eps=args.norm_eps)

    def forward(self, x, freqs_cis, resets, positions=None):
        x = x + self.mixer(self.attention_norm(x), resets)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self):
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.feed_forward.init_weights(self.weight_init_std)
        self.mixer.init_weights(output_scale=self.weight_init_std / 0.02)


class Llama3GDN2(Transformer):
    def __init__(self, args):
        super().__init__(args)
        for layer in range(1, args.n_layers, 2):
            self.layers[str(layer)] = GDN2Block(layer, args)

    def forward(self, tokens, attention_masks=None, positions=None, resets=None):
        """resets, bool [B, T], come with the tokens from the data loader: where a document begins."""
        h = self.tok_embeddings(tokens) + 0  # a compiled layer takes no collective that is still under way
        for layer, block in self.layers.items():
            h = block(h, self.freqs_cis, resets if int(layer) % 2 else attention_masks, positions)
        return self.output(self.norm(h))


def parallelize(model, parallel_dims, job_config):
    if (degree := job_config.parallelism.context_parallel_degree) != 1:
        raise SystemExit(f"parallelism.context_parallel_degree is {degree}; with llama3_gdn2 it must be 1")
    if parallel_dims.tp_enabled:
        for block in list(model.layers.values())[1::2]:
            apply_mixer_tensor_parallel(block.mixer, parallel_dims.get_mesh("tp"))
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        training = job_config.training
        reduce_dtype = TORCH_DTYPE_MAP[training.mixed_precision_reduce]
        shard_decays(model, parallel_dims.get_mesh(names), reduce_dtype, training.enable_cpu_offload)
    llama3._op_sac_save_list.update(SAVED_OPS)  # selective checkpointing by op: keep what the mixer gave
    model = llama3.parallelize_llama(model, parallel_dims, job_config)
    for unit in model.modules():  # for gloo, which has only sums; on GPUs leave this loop out
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
    return model


settle_device()  # the CPU where there is no accelerator; on GPUs leave it out
register_train_spec(
    "llama3_gdn2",
    TrainSpec(
        model_cls=Llama3GDN2,
        model_args=llama3_args,
        parallelize_fn=parallelize,
        pipelining_fn=None,  # later stages would not get the resets: TorchTitan refuses a pipeline
        build_optimizers_fn=build_optimizers,  # no weight decay on A_log, dt_bias and norms
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_hf_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
    ),
)
