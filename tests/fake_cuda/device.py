# ruff: noqa: E402
"""A pretended cuda:0 on a CPU build of torch: numbers are computed on the CPU, by the device, autocast and scaler rules of CUDA.

A tensor "on" the device is a wrapper that says cuda:0 and holds a CPU tensor. Every operation passes `PretendedCuda`, which
refuses what CUDA refuses (tensors of two devices) and records what makes the host wait. Not covered: kernels, streams, NCCL, the
device's random numbers.
"""
import collections
import contextlib
import ctypes
import importlib.util
import sys
import traceback
from pathlib import Path
from unittest import mock

if "torch" in sys.modules:
    raise RuntimeError("import this before torch, which asks for CUDA's hooks once, when it is imported")
ctypes.CDLL(str(Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])  # the built backend.cpp

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda:0")
MEMORY = 80 * 2**30
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal", "aten::_unique2"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPIES = {"aten::_to_copy", "aten::copy_"}


class CudaTensor(torch.Tensor):
    """A CPU tensor, `.cpu_tensor`, that says it is on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, cpu_tensor.size(), strides=cpu_tensor.stride(), storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype, device=DEVICE,
        )  # fmt: skip
        wrapper.cpu_tensor = cpu_tensor
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return PretendedCuda.current.compute(operation, args, kwargs or {})


def names_cuda(device):
    """Whether an argument `device` names the pretended one."""
    return device is not None and torch.device(device).type == "cuda"


class PretendedCuda(TorchDispatchMode):
    """Computes every operation.

    Attributes:
        phase: what the program does now, set by the tests; host waits are recorded while it is not None.
        waits: phase: {"what @ file:line": how often}.
        device_files: files saved with tensors on the device, which a machine without one could not load as they are.
    """

    current = None

    def __init__(self):
        super().__init__()
        self.phase = None
        self.waits = collections.defaultdict(collections.Counter)
        self.device_files = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.compute(operation, args, kwargs or {})

    def compute(self, operation, args, kwargs):
        """The result of an operation, on the device that CUDA would leave it on."""
        values, structure = tree_flatten((args, kwargs))
        on_device = [value for value in values if isinstance(value, CudaTensor)]
        device = kwargs.get("device")
        if not on_device and not names_cuda(device):
            return operation(*args, **kwargs)
        name = operation._schema.name
        result_on_device = True
        if name in COPIES:
            result_on_device = self._check_copy(name, args, kwargs)
        elif name in INDEXING:
            self._check_index(name, args)
        else:
            self._check_devices(operation, name, [value for value in values if isinstance(value, torch.Tensor)])
        if name in READS:
            self._record(name)
        plain = [value.cpu_tensor if isinstance(value, CudaTensor) else value for value in values]
        args, kwargs = tree_unflatten(plain, structure)
        if names_cuda(device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        wrappers = {id(value.cpu_tensor): value for value in on_device}  # an operation in place returns its argument
        result = operation(*args, **kwargs)
        if not result_on_device:
            return result
        return tree_map_only(
            torch.Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else CudaTensor(tensor), result
        )

    def _check_copy(self, name, args, kwargs):
        if name == "aten::copy_":
            target, source, non_blocking = args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            to_device = isinstance(target, CudaTensor)
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking")
            to_device = names_cuda(kwargs["device"]) if kwargs.get("device") is not None else isinstance(source, CudaTensor)
        if isinstance(source, CudaTensor) and not to_device:
            self._record("copy to the host")
        elif to_device and not isinstance(source, CudaTensor) and not (non_blocking and hasattr(source, "pinned")):
            self._record("copy to the device, blocking or not from pinned memory")
        return to_device

    def _check_index(self, name, args):
        tensor, indices = args[:2]
        values = [value for value in args[2:3] if isinstance(value, torch.Tensor) and value.dim()]
        if not all(isinstance(value, CudaTensor) for value in [tensor, *values]):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self._record("index by a boolean mask")
            elif index is not None and not isinstance(index, CudaTensor):
                self._record("index by a CPU tensor")

    def _check_devices(self, operation, name, tensors):
        # where CUDA takes a number that lies on the CPU
        scalars = name == "aten::fill_" or torch.Tag.pointwise in operation.tags and name != "aten::lerp"
        if any(not isinstance(tensor, CudaTensor) and not (scalars and tensor.dim() == 0) for tensor in tensors):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu, of shapes {shapes}")

    def _record(self, what):
        if self.phase is None:
            return
        own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        own = [frame for frame in own if "tests" not in Path(frame.filename).relative_to(ROOT).parts]
        where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "backward pass"
        self.waits[self.phase][f"{what} @ {where}"] += 1


def pin_memory(tensor, *_):
    """In place of `Tensor.pin_memory`."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def saving(save, mode):
    """`torch.save` that notes files with tensors on the device, and writes these from the CPU."""

    def noted(content, file, *args, **kwargs):
        if any(isinstance(value, CudaTensor) for value in tree_flatten(content)[0]):
            mode.device_files.append(file.name)
        return save(tree_map_only(CudaTensor, lambda tensor: tensor.cpu_tensor, content), file, *args, **kwargs)

    return noted


@contextlib.contextmanager
def pretended_cuda(free_memory=MEMORY):
    """Pretend, inside, that there is one GPU with so many free bytes; yields the `PretendedCuda`."""
    answers = {
        "torch.cuda._lazy_init": None, "torch.cuda.manual_seed_all": None, "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1, "torch.cuda.current_device": 0, "torch.cuda.mem_get_info": (free_memory, MEMORY),
        "torch.cuda.set_rng_state": None, "torch.cuda.synchronize": None,
        "torch.cuda.amp.common.amp_definitely_not_available": False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch("torch.cuda.get_rng_state", lambda *_: torch.get_rng_state()))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        torch.__future__.set_swap_module_params_on_conversion(True)  # a wrapper cannot take the place of a CPU tensor's data
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        PretendedCuda.current = mode = PretendedCuda()
        stack.enter_context(mock.patch("torch.save", saving(torch.save, mode)))
        yield stack.enter_context(mode)
