# ruff: noqa: E402
"""A pretended cuda:0 on a CPU build of torch: numbers are computed on the CPU, by the device, autocast and scaler rules of CUDA.

A tensor "on" the device is a wrapper that says cuda:0 and holds a CPU tensor. Every operation passes `PretendedCuda`, which
refuses what CUDA refuses (tensors of two devices) and records what makes the host wait. Not covered: kernels, streams, NCCL, the
device's random numbers. It is a plugin of pytest, because plugins come before anything that imports torch.
"""
import collections
import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PROGRAM = tuple(f"{Path(__file__).parents[2] / name}" for name in ("models", "utils"))
TORCH = Path(importlib.util.find_spec("torch").origin).parent
if "torch" in sys.modules:
    raise RuntimeError("import this before torch, which asks for CUDA's hooks once, when it is imported")
with tempfile.TemporaryDirectory() as folder:
    backend = Path(folder, "backend.so")
    build = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{TORCH / 'include'}", Path(__file__).with_name("backend.cpp")]
    subprocess.run([*build, "-o", backend], check=True)
    ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(backend))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal", "aten::_unique2"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class CudaTensor(torch.Tensor):
    """A CPU tensor, `.cpu_tensor`, that says it is on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, cpu_tensor.size(), strides=cpu_tensor.stride(), storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype, device=torch.device("cuda:0"),
        )  # fmt: skip
        wrapper.cpu_tensor = cpu_tensor
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):  # called where no mode is, as in the backward pass
        return PretendedCuda.current.__torch_dispatch__(operation, types, args, kwargs)


class PretendedCuda(TorchDispatchMode):
    """Computes every operation, on a GPU of so many free bytes.

    Attributes:
        waits: {"phase: what @ file:line": how often} of what made the host wait in phases, see `phase`.
        device_files: files saved with tensors on the device, which a machine without one could not load as they are.
    """

    current = None

    def __init__(self, free_memory=2**36):
        super().__init__()
        self.free_memory, self.waits, self.device_files, self._phase = free_memory, collections.Counter(), [], None
        PretendedCuda.current = self

    @contextlib.contextmanager
    def phase(self, name):
        """Record waits under this name during a block, or a function that this decorates; None: record none."""
        outer, self._phase = self._phase, name
        yield
        self._phase = outer

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """The result of an operation, on the device that CUDA would leave it on."""
        kwargs = kwargs or {}
        values, _ = tree_flatten((args, kwargs))
        wrappers = {id(value.cpu_tensor): value for value in values if isinstance(value, CudaTensor)}
        devices = [value.type for value in values if isinstance(value, torch.device)]
        if not wrappers and "cuda" not in devices:
            return operation(*args, **kwargs)
        name, on_device = operation._schema.name, True
        if name == "aten::_to_copy":
            on_device = "cpu" not in devices
            self._check_copy(args[0], on_device, kwargs.get("non_blocking"))
        elif name == "aten::copy_":
            on_device = isinstance(args[0], CudaTensor)
            self._check_copy(args[1], on_device, args[2:] == (True,))
        elif name in INDEXING:
            self._check_devices(name, [args[0], *args[2:3]], scalars=True)
            self._check_indices(index for index in args[1] if index is not None)
        else:
            scalars = name == "aten::fill_" or torch.Tag.pointwise in operation.tags and name != "aten::lerp"
            self._check_devices(name, values, scalars)
        if name in READS:
            self._record(name)
        args, kwargs = tree_map(on_cpu, (args, kwargs))
        result = operation(*args, **kwargs)
        if not on_device:
            return result
        return tree_map_only(  # an operation in place returns its argument
            torch.Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else CudaTensor(tensor), result
        )

    def _check_copy(self, source, to_device, non_blocking):
        from_pinned = to_device and non_blocking and hasattr(source, "pinned")
        if isinstance(source, CudaTensor) != to_device and not from_pinned:
            self._record("copy to the device, blocking or not from pinned memory" if to_device else "copy to the host")

    def _check_indices(self, indices):
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                self._record("index by a boolean mask")
            elif not isinstance(index, CudaTensor):
                self._record("index by a CPU tensor")

    def _check_devices(self, name, values, scalars):
        """Refuse tensors that lie on the CPU, but for single numbers where CUDA takes `scalars`."""
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if any(not isinstance(tensor, CudaTensor) and not (scalars and tensor.dim() == 0) for tensor in tensors):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu, of shapes {shapes}")

    def _record(self, what):
        if self._phase is not None:
            own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PROGRAM)]
            where = f"{own[-1].filename}:{own[-1].lineno}" if own else "backward pass"
            self.waits[f"{self._phase}: {what} @ {where}"] += 1


def on_cpu(value):
    """What an operation on the CPU takes in place of an argument."""
    if isinstance(value, CudaTensor):
        return value.cpu_tensor
    return torch.device("cpu") if isinstance(value, torch.device) else value


def pin_memory(tensor, *_):
    """In place of `Tensor.pin_memory`."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def save(content, file, *args, save=torch.save, **options):
    """In place of `torch.save`: notes files with tensors on the device, and writes these from the CPU."""
    if any(isinstance(value, CudaTensor) for value in tree_flatten(content)[0]):
        PretendedCuda.current.device_files.append(file.name)
    save(tree_map_only(CudaTensor, on_cpu, content), file, *args, **options)


torch.Tensor.pin_memory, torch.save = pin_memory, save
torch.__future__.set_swap_module_params_on_conversion(True)  # a wrapper cannot take the place of a CPU tensor's data
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.mem_get_info = lambda _: (PretendedCuda.current.free_memory, 2**36)
torch.cuda.get_rng_state = lambda _: torch.get_rng_state()
for name in ("_lazy_init", "manual_seed_all", "set_rng_state"):
    setattr(torch.cuda, name, lambda *_: None)
