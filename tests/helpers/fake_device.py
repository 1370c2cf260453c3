"""A second device on a machine that has none: tensors that say so, and are computed on the CPU.

Operations on tensors of two devices raise, as on a GPU, but for numbers (0-dim tensors of the CPU). So code that moves
things is told what it has forgotten.
"""

from __future__ import annotations

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


FAKE = torch.device("privateuseone", 0)


def install():
    """Register the device for the whole process, for good: call it in a process of its own.

    Raises:
        AttributeError: torch is too old for backends in Python.
    """
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend(backend_module=module)


class OnFake(torch.Tensor):
    """A tensor that says that it is on the device."""

    @staticmethod
    def __new__(cls, held):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": FAKE}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **how)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with FakeDevice():
            return func(*args, **(kwargs or {}))

    def tolist(self):  # torch does not do it for subclasses
        return self.held.tolist()

    def __repr__(self):
        return f"OnFake({self.held!r})"


class FakeDevice(TorchDispatchMode):
    """While it is on, things can be moved to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_fake = any(isinstance(tensor, OnFake) for tensor in tensors)
        strangers = [tensor for tensor in tensors if not isinstance(tensor, OnFake) and tensor.dim()]
        if on_fake and strangers and func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {strangers[0].shape}")
        if kwargs.get("device") is not None:
            on_fake = torch.device(kwargs["device"]).type == FAKE.type
            kwargs["device"] = torch.device("cpu")
        held = tree_map(lambda x: x.held if isinstance(x, OnFake) else x, (args, kwargs))
        result = func(*held[0], **held[1])
        if func._schema.is_mutable:  # in place, or into out=
            return kwargs.get("out", args[0])
        return tree_map(lambda x: OnFake(x) if isinstance(x, torch.Tensor) and on_fake else x, result)
