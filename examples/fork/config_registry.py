"""TorchTitan 0.3: a fork's own config function. ``--module examples.fork --config gdn2_of_the_fork``"""

from gdn2_titan.titan.config_registry import gdn2_debug_hybrid


def gdn2_of_the_fork():
    config = gdn2_debug_hybrid()
    config.dump_folder = "./outputs/fork"
    config.gdn2.window = 64
    config.gdn2.document_resets = False
    config.training.steps = 40
    config.optimizer.lr = 1e-3
    config.metrics.log_freq = 1
    config.validator.enable = False
    return config
