"""``nnunet_diffext predict``: nnUNetv2_predict with averaged probabilities, samples, uncertainty and quality scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_diffext.files import FINAL


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``predict``."""
    parser = subparsers.add_parser(
        "predict",
        description="Predict a folder of images with any model of nnU-Net or of this package, with the flags of "
        "nnUNetv2_predict. Probabilities instead of logits are averaged over tiles, mirrored passes, folds and "
        "samples; OUT/quality.csv says per case how good the prediction expects itself to be. One bad image does not "
        "end the batch: it is reported at the end, and the exit code is 1.",
    )
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, called CASE_0000.nii.gz, CASE_0001.nii.gz")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="output folder, made if it does not exist")
    add_model_arguments(parser)
    add_setting_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="nnU-Net's own messages")
    parser.add_argument("--save_probabilities", action="store_true", help="also CASE.npz and CASE.pkl, as nnU-Net does")
    parser.add_argument(
        "--continue_prediction", action="store_true", help="skip cases whose files are all there, keep their scores"
    )
    parser.add_argument(
        "-npp", type=int, default=int(os.environ.get("nnUNet_npp", 3)), metavar="N",
        help="processes for preprocessing; 0: none of its own (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "-nps", type=int, default=int(os.environ.get("nnUNet_nps", 3)), metavar="N",
        help="processes for resampling and writing; 0: none of its own (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "-prev_stage_predictions", metavar="FOLDER", help="predictions of the previous stage; a cascade needs them"
    )
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="calls that share the cases (default: 1)")
    parser.add_argument("-part_id", type=int, default=0, metavar="N", help="which of them this is, from 0 (default: 0)")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    parser.add_argument("--not_on_device", action="store_true", help="collect results in main memory")
    parser.add_argument(
        "--uncertainty", action="store_true",
        help="also OUT/uncertainty/CASE_entropy, _mutual_information and _variance, as images of floats",
    )  # fmt: skip
    parser.add_argument(
        "--save_samples", action="store_true", help="also the segmentation of every sample, OUT/samples/CASE_sampleNN"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="LABEL=TEXT",
        help="another prompt for a label of a TextDiffSegTrainer model; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--modality", metavar="NAME",
        help="modality of all images, for an M4oETrainer model; without it, the model tells it",
    )  # fmt: skip
    parser.add_argument("--no_temperature", action="store_true", help="ignore the model's calibration.json")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, as in nnUNetv2_predict and nnUNetv2_predict_from_modelfolder."""
    parser.add_argument("-d", metavar="DATASET", help="dataset name or ID")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: %(default)s)")
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="trainer (default: %(default)s)")
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration; needed with -d")
    parser.add_argument("-m", metavar="MODEL_FOLDER", help="folder of the model, instead of -d, -c, -tr and -p")
    parser.add_argument(
        "-f", nargs="+", default=(0, 1, 2, 3, 4), metavar="FOLD", help="folds of the model (default: 0 1 2 3 4)"
    )
    parser.add_argument("-chk", default=FINAL, metavar="FILE", help="checkpoint (default: %(default)s)")
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps (default: cuda)")


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """How the members of the ensemble are made."""
    parser.add_argument(
        "-step_size", type=float, default=0.5, help="of the sliding window, relative to the patch (default: 0.5)"
    )
    parser.add_argument("--disable_tta", action="store_true", help="no mirrored passes")
    parser.add_argument(
        "-samples", type=int, metavar="M", help="samples per pass; 0: deterministic prediction (default: the model's)"
    )
    parser.add_argument("-steps", type=int, metavar="S", help="denoiser evaluations per sample (default: the model's)")
    parser.add_argument("-sampler", choices=("ddim", "ddpm", "dpm++"), help="default: the model's")
    parser.add_argument("-seed", type=int, default=0, help="of the samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Predict, and report."""
    from nnunet_diffext.data.prompts import parse_change
    from nnunet_diffext.inference.batch import find_cases, predict_folder
    from nnunet_diffext.inference.calibration_file import describe_use, read_calibration
    from nnunet_diffext.inference.export import Output
    from nnunet_diffext.inference.modality import set_modality
    from nnunet_diffext.inference.model_folder import find_model_folder, parse_folds
    from nnunet_diffext.inference.predictor import Predictor
    from nnunet_diffext.inference.prompts import change_prompts

    if args.npp < 0 or args.nps < 0:
        raise ValueError("-npp and -nps must be 0 or more.")
    folder = find_model_folder(args.d, args.c, args.tr, args.p, args.m)
    calibration = None if args.no_temperature else read_calibration(folder)
    predictor = Predictor(
        folder, parse_folds(args.f), checkpoint=args.chk, device=args.device, step_size=args.step_size,
        mirroring=not args.disable_tta, samples=args.samples, steps=args.steps, sampler=args.sampler, seed=args.seed,
        temperature=1.0 if calibration is None else calibration["temperature"], on_device=not args.not_on_device,
        verbose=args.verbose,
    )  # fmt: skip
    if args.prompt:
        prompts = change_prompts(predictor.nnunet, dict(parse_change(text) for text in args.prompt))
        print("Prompts: " + "; ".join(f"{label}: {text}" for label, text in prompts.items()))
    if args.modality:
        set_modality(predictor.nnunet, args.modality)
    if args.save_samples and not predictor.sampling.samples:
        raise ValueError("--save_samples: this prediction draws no samples. Leave it out, or choose -samples M.")
    find_cases(predictor.model, Path(args.i), args.part_id, args.num_parts)
    for line in describe_use(calibration, folder, predictor.settings.as_dict(), args.modality):
        print(line)
    samples = predictor.sampling.samples if args.save_samples else 0
    report = predict_folder(
        predictor,
        args.i,
        Output(Path(args.o), args.save_probabilities, args.uncertainty, samples),
        previous_stage=args.prev_stage_predictions,
        continue_prediction=args.continue_prediction,
        num_parts=args.num_parts,
        part_id=args.part_id,
        preprocessing_processes=args.npp,
        export_processes=args.nps,
        show_progress=not args.disable_progress_bar,
        verbose=args.verbose,
        arguments={k: v for k, v in vars(args).items() if k not in ("verb", "debug")},
    )
    print("\n".join(report.lines()))
    return 1 if report.failed else 0
