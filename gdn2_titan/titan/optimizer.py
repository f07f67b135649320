"""Weight decay as the paper has it: none on A_log, dt_bias, norms and biases."""

__all__ = ["is_decayed"]


def is_decayed(name, param):
    """Whether weight decay applies to a parameter of the decoder: to matrices, the convolutions' among them."""
    return param.ndim > 1 and not name.endswith("dt_bias")
