"""An op's derivative where ``register_autograd`` does not reach: torch.func.grad fails on such an op, and forward-mode
AD silently takes it for a constant. A torch.autograd.Function around the op serves the one and refuses the other."""

import torch

__all__ = ["differentiable", "once"]


def differentiable(op, setup_context, backward):
    """op(*args) with the derivative that the op was registered with, for all of eager PyTorch. What public functions
    call; compiled, it is the op itself, since the compiler caches no graph with a custom Function."""

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return op(*args)

    Differentiable.setup_context = staticmethod(setup_context)
    Differentiable.backward = staticmethod(backward)

    def call(*args):
        if not torch.compiler.is_compiling():
            return Differentiable.apply(*args)
        if torch._C._are_functorch_transforms_active():
            torch._dynamo.graph_break(msg="the op is differentiated by torch.func in eager PyTorch only")
        return op(*args)

    return call


def once(backward_op, names):
    """backward_op(*args), whose derivative is an error: without one, autograd would take gradients for constants."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{names} cannot be differentiated twice; {backward_op._name} has no derivative")

    backward_op.register_autograd(refuse)
    return differentiable(backward_op, lambda ctx, inputs, output: None, refuse)
