"""Operators of ``torch.library``: how one is registered, and its derivative in all of PyTorch.

A call crosses one autograd boundary, a ``torch.autograd.Function`` around what lies below autograd. Compiled, it is the
operator itself, since the compiler caches no graph with a custom Function. Under torch.func, which knows no derivative
of an operator, another Function takes the call. Both refuse forward-mode AD, which would take an operator for a
constant.
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad

__all__ = ["define", "differentiable", "differentiable_once", "no_autocast", "overwriting", "register_shardings"]


def define(qualname: str, schema: str, kernel: Callable, fake: Callable) -> OpOverload:
    """Register an operator: its ``kernel`` for every device, and ``fake`` for the shapes of its results.

    Not by ``torch.library.custom_op``: the first call of such an operator imports torch._dynamo, and that DTensor.
    """

    @functools.cache
    def uncompiled():
        return torch._dynamo.disable(kernel)

    def run(*args):
        # Where Dynamo is at work, a compiled function that calls the operator must not have its kernel compiled too.
        return uncompiled()(*args) if "torch._dynamo" in sys.modules else kernel(*args)

    def shapes(*args):
        register_shardings()  # DTensor asks for the shapes before it looks for a rule, also in inference mode
        return fake(*args)

    torch.library.define(qualname, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualname, "default", run)
    torch.library.register_fake(qualname, shapes)
    namespace, _, name = qualname.partition("::")
    return getattr(getattr(torch.ops, namespace), name).default


@functools.cache
def _register_shardings():
    from .sharding import register

    register()


def register_shardings() -> None:
    """Tell DTensor of the operators, if anybody has imported it; otherwise no argument is one."""
    if "torch.distributed.tensor" in sys.modules:
        _register_shardings()


def _is_dtensor(x):
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast reaches into an op's eager body but not into its compiled call: the two must not differ."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def differentiable(op: OpOverload, setup_context: Callable, backward: Callable) -> Callable:
    """Register the derivative of an operator, and return op(*args) as public functions call it, all args given.

    Args:
        setup_context: (ctx, inputs, output), as of ``torch.autograd.Function``.
        backward: (ctx, *grads); what it returns may end early, the rest of the inputs having no gradients.
    """
    defaults = [argument.default_value for argument in op._schema.arguments]

    def gradients(ctx, *grads):
        found = backward(ctx, *grads)
        return (*found, *[None] * (len(defaults) - len(found)))

    class Boundary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

    class UnderTransforms(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return op(*args)

    UnderTransforms.setup_context = staticmethod(setup_context)
    Boundary.backward = UnderTransforms.backward = staticmethod(gradients)

    def eager(*args):
        # Not only where a gradient is needed: forward-mode AD must not pass unseen.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return Boundary.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def call(*args):
        if torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                torch._dynamo.graph_break(msg="the op is differentiated by torch.func in eager PyTorch only")
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return UnderTransforms.apply(*args)
        return eager(*args)

    # Of the bare operator. The dispatcher leaves out what equals a default.
    torch.library.impl(op._name, "Autograd", lambda *args: eager(*args, *defaults[len(args) :]))
    return call


def differentiable_once(backward_op: OpOverload, names: str, like: str) -> Callable:
    """backward_op(*args), whose derivative is an error: without one, autograd would take gradients for constants.

    like: the argument that the first one, a gradient or None, has the shape and dtype of."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{names} cannot be differentiated twice; {backward_op._name} has no derivative")

    at = [argument.name for argument in backward_op._schema.arguments].index(like)
    once = differentiable(backward_op, lambda ctx, inputs, output: None, refuse)

    def call(*args):
        if args[0] is None and _is_dtensor(args[at]):
            # DTensor of torch 2.11 looks for the mesh in the first argument alone.
            args = torch.zeros_like(args[at]), *args[1:]
        return once(*args)

    return call


def overwriting(op: OpOverload, *names: str) -> Callable:
    """op(*args) that writes to its arguments of these names, which autograd is told."""
    every = [argument.name for argument in op._schema.arguments]
    places = [every.index(name) for name in names]

    def eager(*args):
        register_shardings()
        for place in places:
            torch.autograd.graph.increment_version(args[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*args)

    torch.library.impl(op._name, "ADInplaceOrView", eager)
    return lambda *args: op(*args) if torch.compiler.is_compiling() else eager(*args)
