"""``nnunet_diffext plan``: size patch and batch for a method, on data that nnU-Net has preprocessed."""

from __future__ import annotations

import argparse

from nnunet_diffext.planners import PLANNERS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``plan``."""
    parser = subparsers.add_parser(
        "plan",
        description="Plan patch and batch size for a method's training step within a GPU memory target. Everything "
        "else, the preprocessed data included, is taken from plans that nnU-Net made; these are never changed. Memory "
        "is measured if there is a GPU with as much free memory, and estimated otherwise.",
    )
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="dataset names or IDs")
    parser.add_argument("-pl", required=True, choices=PLANNERS, help="planner")
    parser.add_argument(
        "-gpu_memory_target",
        type=float,
        default=8,
        metavar="GB",
        help="GPU memory that a training may need, CUDA context included (default: 8, nnU-Net's reference)",
    )
    parser.add_argument(
        "-p", default="nnUNetPlans", metavar="BASE_PLANS", help="plans to start from (default: %(default)s)"
    )
    parser.add_argument(
        "-overwrite_plans_name", metavar="NAME", help="name of the new plans (default: that of the planner)"
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        nargs="+",
        type=float,
        metavar="MM",
        help="another target spacing for 3d_fullres and what follows from it, three numbers; the data must then be "
        "preprocessed again",
    )
    parser.add_argument(
        "-c", nargs="+", metavar="CONFIGURATION", help="default: nnU-Net's standard ones that the base plans have"
    )
    parser.add_argument("-tr", metavar="TRAINER", help="plan for this variant of the planner's trainer")
    parser.add_argument("-device", choices=("cuda", "cpu"), help="cpu: estimate even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Plan every dataset."""
    import torch

    from nnunet_diffext.planners import find_planner

    use_gpu = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no GPU here. Leave the flag out to estimate.")
    for dataset in args.d:
        find_planner(args.pl)(
            dataset,
            args.gpu_memory_target,
            base_plans=args.p,
            plans_name=args.overwrite_plans_name,
            overwrite_target_spacing=args.overwrite_target_spacing,
            configurations=args.c,
            trainer_name=args.tr,
            device=torch.device("cuda", torch.cuda.current_device()) if use_gpu else None,
        ).plan_experiment()
    return 0
