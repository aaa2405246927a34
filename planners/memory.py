"""How much GPU memory a training step needs: by counting the tensors that are alive, or by measuring on a GPU.

The count runs the real step on tensors without data (``FakeTensorMode``), so it takes seconds on any machine,
whatever the size, and sees what autograd keeps, temporary results, gradients and the casts of mixed precision. What it
cannot see (CUDA context, cuDNN workspaces, blocks that the allocator keeps) is added as an allowance.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
"""Bytes of a GB, as nvidia-smi counts them."""

CONTEXT = int(0.75 * GIB)
"""CUDA context, library handles and rounding, in bytes."""

WORKSPACE_SHARE, WORKSPACE_LIMIT = 0.5, int(2.25 * GIB)
"""cuDNN workspaces, cached blocks and one feature map (autograd copies the gradient of an in-place activation once more
if there is data), relative to the counted tensors and in bytes. With these, the count for stock nnU-Net (patch 128^3,
batch 2) comes to 7.6 GB for PlainConvUNet and 9.7 GB for ResEnc M, where nnU-Net's documentation (resenc_presets.md,
nvidia-smi) reports 7.7 and 9.1. It does not say for which patch size."""


class Step(Protocol):
    """A trainer that can take training steps (see :class:`nnunet_diffext.planners.dry_run.DryRun`)."""

    network: nn.Module
    teacher: nn.Module | None
    moments: int
    """Tensors that the optimiser keeps per trained parameter: 1 for SGD with momentum, 2 for Adam."""

    def losses(self) -> Tensor:
        """The weighted sum of the losses on a new batch, mixed precision included."""

    def train(self) -> None:
        """One complete training step."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, in bytes.

    Attributes:
        fixed: independent of patch and batch: parameters, the optimiser's moments, EMA teacher, CUDA context.
        variable: most bytes of all other tensors that are alive at once.
        workspace: allowance for what the count does not see; 0 if measured.
        measured: on a GPU, instead of counted.
    """

    fixed: int
    variable: int
    workspace: int
    measured: bool = False

    @property
    def total(self) -> int:
        """What the step needs."""
        return self.fixed + self.variable + self.workspace

    def __str__(self) -> str:
        return f"{self.total / GIB:.2f} GB ({'measured' if self.measured else 'estimated'})"

    def scaled(self, factor: float) -> StepMemory:
        """A guess at the memory for ``factor`` times as many voxels."""
        variable = int(factor * self.variable)
        return replace(self, variable=variable, workspace=0 if self.measured else workspace_for(variable))

    def extrapolated(self, other: StepMemory, position: float) -> StepMemory:
        """An estimate on the line from this one (position 0) through ``other`` (position 1)."""
        variable = self.variable + int(position * (other.variable - self.variable))
        return replace(self, variable=variable, workspace=workspace_for(variable))


def workspace_for(variable: int) -> int:
    """The allowance in bytes for what :func:`count_step` does not see."""
    return min(int(WORKSPACE_SHARE * variable), WORKSPACE_LIMIT)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside the context and still alive; views share their storage.

    A number that is read from a tensor without data is 0: the start of a crop, a verdict "not finite".

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch's guard against compiling the method below would take half of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:  # most of all calls
                return args[0].fake_device
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # Python wrappers of one storage come and go, this does not
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def forget_data(network: nn.Module) -> nn.Module:
    """Replace parameters and buffers by new ones on the CPU; inside ``FakeTensorMode`` these take no memory."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return network


def size_in_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def trained_bytes(network: nn.Module) -> int:
    """Bytes of the parameters that an optimiser changes."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def fixed_bytes(step: Step) -> int:
    """Bytes of network, the optimiser's moments and teacher."""
    copies = 1 + (step.teacher is not None)
    return copies * size_in_bytes(step.network) + step.moments * trained_bytes(step.network)


def count_step(step: Step) -> StepMemory:
    """Count one step: forward, backward with growing gradients, and SGD. Works with real CPU tensors as well.

    Args:
        step: with tensors without data inside ``FakeTensorMode``, or with real ones.
    """
    with LiveBytes() as count:
        step.losses().backward()
    # at the end, gradients, teacher and batch are alive; Nesterov momentum and weight decay (or Adam's update and its
    # denominator) each copy the gradients
    variable = max(count.peak, count.live + 2 * trained_bytes(step.network))
    return StepMemory(fixed_bytes(step) + CONTEXT, variable, workspace_for(variable))


def measure_step(build: Callable[[torch.device], Step], device: torch.device) -> StepMemory | None:
    """Measure a real step on a GPU.

    Args:
        build: makes the step with real tensors on the device.
        device: of type ``cuda``.

    Returns:
        What it needs; ``None`` if the GPU has not enough memory.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # as in nnU-Net's training
    step = None
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        step = build(device)
        step.train()  # chooses cuDNN's algorithms, makes the moments
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step.train()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        fixed = min(peak, fixed_bytes(step))
        return StepMemory(fixed + CONTEXT, peak - fixed, 0, measured=True)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.backends.cudnn.benchmark = benchmark
        del step
        torch.cuda.empty_cache()


def can_measure(device: torch.device, target: float) -> bool:
    """Whether the GPU has ``target`` bytes free, so that 'out of memory' would say something about the plan."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.mem_get_info(device)[0] >= target
