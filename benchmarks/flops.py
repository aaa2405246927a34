"""Operations of one prediction next to those of the planned U-Net, counted on tensors without data.

    python benchmarks/flops.py

Plans as nnU-Net makes them: a 3D full-resolution plan of 128^3, the left atrium's small one, a 2D plan of 512^2.
M4oE at the size of its paper: 224^2, three channels, nine classes in every modality.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.dmed import DMEDNet
from nnunet_diffext.networks.leaf import LEAFNet
from nnunet_diffext.networks.m4oe import M4oENet
from nnunet_diffext.networks.mask_autoencoder import MaskAutoencoder
from nnunet_diffext.networks.textdiffseg import LabelCodec, TextDiffSegNet

CLASSES, TOKENS, TOKEN_WIDTH, STEPS = 3, 12, 768, 10
PLANS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {  # patch, features, stride of the latents
    "3D, 128x128x128": ((128, 128, 128), (32, 64, 128, 256, 320, 320), 8),
    "3D, left atrium, 24x40x48": ((24, 40, 48), (16, 32, 64, 128), 4),
    "2D, 512x512": ((512, 512), (32, 64, 128, 256, 512, 512, 512, 512), 8),
}
M4OE: dict[str, tuple[int, dict[str, Any]]] = {  # modalities, options
    "plain MLPs: Swin-UNet": (3, {"where": "none"}),
    "1 expert": (1, {"gate": "none"}),
    "2 experts": (2, {}),
    "3 experts": (3, {}),
    "3 experts, gate of the authors' code": (3, {"gate": "channel"}),
    "4 experts": (4, {}),
    "3 experts, convolutions at full resolution (the default)": (3, {"stem": True, "tells": True}),
}


def plain_unet(dim: int, features: tuple[int, ...]) -> Architecture:
    """nnU-Net's default U-Net: two convolutions per stage, isotropic strides."""
    stages = len(features)
    kwargs = {
        "n_stages": stages, "features_per_stage": list(features), "conv_op": getattr(nn, f"Conv{dim}d"),
        "kernel_sizes": [[3] * dim] * stages, "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
        "n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1), "conv_bias": True,
        "norm_op": getattr(nn, f"InstanceNorm{dim}d"), "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    return Architecture.from_plans(name, kwargs, [])


def giga_operations(run: Callable[[], Any]) -> float:
    """Floating-point operations in 10^9, a multiplication with its addition as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e9


def count(patch: tuple[int, ...], features: tuple[int, ...], stride: int) -> dict[str, float]:
    """Method -> operations of one prediction of a patch with one channel."""
    architecture, space = plain_unet(len(patch), features), LabelSpace(CLASSES)
    with torch.device("meta"):
        image, t = torch.randn(1, 1, *patch), torch.zeros(1, dtype=torch.int64)
        unet = architecture.build(1, CLASSES).eval()
        dmed = DMEDNet(architecture, 1, space).eval()
        codec = MaskAutoencoder(architecture, space, stride=stride)
        leaf = LEAFNet(codec, architecture, 1, space, image_latents=32).eval()
        labels = LabelCodec(architecture, space, stride=stride)
        text_shape = (CLASSES - 1, TOKENS, TOKEN_WIDTH)
        text = TextDiffSegNet(labels, False, architecture, 1, space, text_shape, image_latents=32).eval()
        latents = torch.randn(1, codec.channels, *(p // f for p, f in zip(patch, codec.stride, strict=True)))
        noisy = torch.randn(1, CLASSES, *patch)

        def latent(net: nn.Module, step: nn.Module, steps: int) -> float:
            """Image once, the denoiser at every step, decoder once."""
            known: Tensor = net.known(image)
            once = giga_operations(lambda: (net.known(image), net.codec.decode(latents)))
            return once + steps * giga_operations(lambda: step(known, latents, t))

        return {
            "nnU-Net": giga_operations(lambda: unet(image)),
            "DMED-Seg": giga_operations(lambda: dmed.segment(image, noisy)),
            "LEAF, one step": latent(leaf, leaf.unet, 1),
            f"LEAF, {STEPS} steps": latent(leaf, leaf.unet, STEPS),
            f"TextDiffSeg, {STEPS} steps": latent(text, text.denoiser, STEPS),
        }


def count_m4oe(modalities: int, options: dict[str, Any]) -> dict[str, float]:
    """Parameters and operations of one prediction at the paper's size; the modality is not given."""
    names = {str(m): (True,) * 9 for m in range(modalities)}
    with torch.device("meta"):
        architecture = plain_unet(2, (32, 64, 128, 256, 512, 512))
        net = M4oENet(
            architecture, (224, 224), 3, LabelSpace(9), names, **{"stem": False, "tells": False, **options}
        ).eval()
        image = torch.empty(1, 3, 224, 224)
    operations = giga_operations(lambda: net(image))
    return {"million_parameters": sum(p.numel() for p in net.parameters()) / 1e6, "giga_operations": operations}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    counted = {name: count(*plan) for name, plan in PLANS.items()}
    m4oe = {name: count_m4oe(*row) for name, row in M4OE.items()}
    save_json({"giga_operations": counted, "m4oe": m4oe, **provenance()}, args.out)
    methods = list(next(iter(counted.values())))
    print("| plan | " + " | ".join(methods) + " |\n" + "|---" * (len(methods) + 1) + "|")
    for name, row in counted.items():
        cells = [f"{row[m] / row['nnU-Net']:.2f}x" if m != "nnU-Net" else f"{row[m]:.1f} GFLOP" for m in methods]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| M4oE, 224x224 | parameters | GFLOP |\n|---|---|---|")
    for name, row in m4oe.items():
        print(f"| {name} | {row['million_parameters']:.2f} M | {row['giga_operations']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
