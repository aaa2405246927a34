"""What nnU-Net planned, as an object: the U-Net class and keyword arguments of a plans file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pydoc import locate
from typing import Any

from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import nn

_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
_PER_DECODER_STAGE = ("n_conv_per_stage_decoder",)


@dataclass(frozen=True)
class Architecture:
    """A planned U-Net of dynamic-network-architectures (``PlainConvUNet``, ``ResidualEncoderUNet`` or alike).

    Args:
        network_class: class with ``encoder.stages`` and ``decoder.stages / transpconvs / seg_layers``.
        kwargs: its constructor arguments, classes resolved, but for ``input_channels``, ``num_classes`` and
            ``deep_supervision``.
    """

    network_class: type[nn.Module]
    kwargs: Mapping[str, Any]

    @classmethod
    def from_plans(cls, class_name: str, kwargs: Mapping[str, Any], imports: Sequence[str]) -> Architecture:
        """Resolve the dotted names of a plans file's ``architecture`` block.

        Raises:
            ValueError: if the class cannot be imported.
        """
        network_class = locate(class_name)
        if network_class is None:
            raise ValueError(f"The plans name the network class '{class_name}', which cannot be imported.")
        resolved = {k: locate(v) if k in imports and v is not None else v for k, v in kwargs.items()}
        return cls(network_class, {k: v for k, v in resolved.items() if k != "deep_supervision"})

    @property
    def conv_op(self) -> type[nn.Module]:
        """``nn.Conv2d`` or ``nn.Conv3d``."""
        return self.kwargs["conv_op"]

    @property
    def dim(self) -> int:
        """Number of spatial axes."""
        return int(self.conv_op.__name__[-2])

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """Stride of every stage, one integer per axis."""
        return [(s,) * self.dim if isinstance(s, int) else tuple(s) for s in self.kwargs["strides"]]

    @property
    def kernels(self) -> list[tuple[int, ...]]:
        """Kernel size of every stage, one integer per axis."""
        planned = self.kwargs["kernel_sizes"]
        planned = [planned] * len(self.features) if isinstance(planned, int) else planned
        return [(k,) * self.dim if isinstance(k, int) else tuple(k) for k in planned]

    def norm(self, channels: int) -> nn.Module:
        """A layer of the planned normalisation, none if none is planned."""
        norm_op, kwargs = self.kwargs.get("norm_op"), self.kwargs.get("norm_op_kwargs") or {}
        return nn.Identity() if norm_op is None else norm_op(channels, **kwargs)

    def convolutions(self, count: int, channels: int, features: int, level: int) -> nn.Module:
        """``count`` convolutions with norm and nonlinearity, as the plans have them at stage ``level``."""
        names = ("conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")
        planned = {name: self.kwargs[name] for name in names if name in self.kwargs}
        return StackedConvBlocks(count, self.conv_op, channels, features, self.kernels[level], 1, **planned)

    @property
    def features(self) -> list[int]:
        """Channels of every stage, finest first."""
        return list(self.kwargs["features_per_stage"])

    def check_patch(self, patch_size: Sequence[int]) -> None:
        """Raise ``ValueError`` if the strides do not divide the patch (skip connections would not fit)."""
        total = list(self.stride_of(len(self.strides) - 1))
        if any(p % t for p, t in zip(patch_size, total, strict=True)):
            snapped = [max(t, round(p / t) * t) for p, t in zip(patch_size, total, strict=True)]
            raise ValueError(
                f"Patch size {list(patch_size)} is not divisible by the network's total stride {total}. "
                f"Change 'patch_size' in the plans file, for example to {snapped}."
            )

    def stride_of(self, level: int) -> tuple[int, ...]:
        """Voxels of the image per voxel of stage ``level``, for every axis."""
        total = [1] * self.dim
        for stride in self.strides[: level + 1]:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        return tuple(total)

    def level_within(self, stride: int) -> int:
        """The deepest stage whose stride is at most ``stride`` in every axis and that leaves a stage below it."""
        levels = range(len(self.strides) - 1)
        return max((level for level in levels if max(self.stride_of(level)) <= stride), default=0)

    def coarser(self) -> Architecture:
        """The same network without its finest stage: it starts at the resolution and width of the second one."""
        if self.kwargs["n_stages"] < 3:
            raise ValueError("A network of fewer than 3 stages has no coarser version; use the full-resolution expert.")
        return self._without(1)

    def below(self, level: int) -> Architecture:
        """The network from stage ``level`` on, for input that has that stage's resolution already.

        Raises:
            ValueError: fewer than two stages would be left.
        """
        if self.kwargs["n_stages"] - level < 2:
            raise ValueError(
                f"A network of {self.kwargs['n_stages']} stages leaves none below stage {level}: use a smaller latent "
                "stride, or plans with more stages."
            )
        rest = self._without(level)
        return replace(rest, kwargs={**rest.kwargs, "strides": [(1,) * self.dim, *rest.strides[1:]]})

    def _without(self, stages: int) -> Architecture:
        """The same network without its finest stages."""
        kwargs = dict(self.kwargs)
        for key in _PER_STAGE:
            if isinstance(kwargs.get(key), (list, tuple)):
                kwargs[key] = list(kwargs[key])[stages:]
        for key in _PER_DECODER_STAGE:  # ordered from the coarsest stage to the finest
            if isinstance(kwargs.get(key), (list, tuple)):
                kwargs[key] = list(kwargs[key])[: len(kwargs[key]) - stages]
        kwargs["n_stages"] -= stages
        return replace(self, kwargs=kwargs)

    def with_norm(self, norm_op: type[nn.Module]) -> Architecture:
        """The same network with another normalisation, constructed as ``norm_op(channels, eps=..., affine=True)``."""
        return replace(
            self, kwargs={**self.kwargs, "norm_op": norm_op, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
        )

    def lighter(self, width: float, convolutions: int | None = None) -> Architecture:
        """The same resolutions with ``width`` times the channels (a multiple of 4, at least 4).

        Args:
            width: factor, positive.
            convolutions: at most this many convolutions (residual blocks) per stage; ``None`` keeps what was planned.
        """
        kwargs = dict(self.kwargs)
        kwargs["features_per_stage"] = [max(4, 4 * round(f * width / 4)) for f in self.features]
        if convolutions is not None:
            for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
                if key in kwargs:
                    planned = kwargs[key]
                    least = [planned] if isinstance(planned, int) else planned
                    least = [min(n, convolutions) for n in least]
                    kwargs[key] = least[0] if isinstance(planned, int) else least
        return replace(self, kwargs=kwargs)

    def build(self, input_channels: int, num_classes: int) -> nn.Module:
        """Instantiate and initialise the network, as nnU-Net does.

        Raises:
            ValueError: if it is no U-Net with the parts that the experts are made of.
        """
        net = self.network_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=False, **self.kwargs
        )
        parts = ("encoder.stages", "decoder.stages", "decoder.transpconvs", "decoder.seg_layers")
        missing = [p for p in parts if not hasattr(getattr(net, p.split(".")[0], None), p.split(".")[1])]
        if missing:
            raise ValueError(
                f"{self.network_class.__name__} has no {', '.join(missing)}: the experts are built from U-Nets such as "
                "PlainConvUNet and ResidualEncoderUNet. Plan with nnU-Net's default or ResEnc planners."
            )
        if hasattr(net, "initialize"):
            net.apply(net.initialize)
        return net
