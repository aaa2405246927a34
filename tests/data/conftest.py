"""A tiny dataset, planned and preprocessed by nnU-Net once per session; every test works on a copy."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from synthetic import make_raw_dataset  # noqa: E402

NUMBER, CASES, UNLABELED = 951, 7, 2


@dataclass(frozen=True)
class Dataset:
    """A preprocessed dataset that a test may change."""

    name: str
    raw: Path
    preprocessed: Path

    @property
    def plans(self) -> PlansManager:
        return PlansManager(str(self.preprocessed / "nnUNetPlans.json"))

    @property
    def label_manager(self) -> LabelManager:
        return self.plans.get_label_manager(json.loads((self.preprocessed / "dataset.json").read_text()))

    @property
    def labeled_dir(self) -> Path:
        return self.preprocessed / "nnUNetPlans_3d_fullres"

    @property
    def unlabeled_dir(self) -> Path:
        return self.preprocessed / "nnUNetPlans_3d_fullres_unlabeled"


def _plan_and_preprocess(raw: Path, preprocessed: Path, number: int, configurations: list[str]) -> None:
    """What nnUNetv2_plan_and_preprocess does, without a process pool per configuration."""
    extract_fingerprint_dataset(number, num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiment_dataset(number)
    plans = PlansManager(str(preprocessed / "nnUNetPlans.json"))
    dataset_json = json.loads((raw / "dataset.json").read_text())
    for name in configurations:
        configuration = plans.get_configuration(name)
        folder = preprocessed / configuration.data_identifier
        folder.mkdir()
        preprocessor = configuration.preprocessor_class(verbose=False)
        for i in get_identifiers_from_splitted_dataset_folder(str(raw / "imagesTr"), ".nii.gz"):
            images = sorted(str(f) for f in (raw / "imagesTr").glob(f"{i}_*.nii.gz"))
            label = str(raw / "labelsTr" / f"{i}.nii.gz")
            preprocessor.run_case_save(str(folder / i), images, label, plans, configuration, dataset_json)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with nnUNet_raw and nnUNet_preprocessed. Not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        raw = make_raw_dataset(
            root / "nnUNet_raw",
            NUMBER,
            "Tiny",
            cases=CASES,
            unlabeled=UNLABELED,
            channels=2,
            shape=(14, 30, 30),
            ignore=True,
            ignored_cases=1,
            zero_background=True,
        )
        _vary_spacing(raw)
        _plan_and_preprocess(raw, root / "nnUNet_preprocessed" / raw.name, NUMBER, ["2d", "3d_fullres"])
    return root


def _vary_spacing(raw: Path) -> None:
    """Give two cases a coarser grid than the others have, so that they are resampled."""
    for file in (*raw.glob("images*/*_000_*.nii.gz"), *raw.glob("labelsTr/*_000.nii.gz")):
        image = sitk.ReadImage(str(file))
        image.SetSpacing((1.3, 1.3, 1.2))
        sitk.WriteImage(image, str(file))


@pytest.fixture
def tiny(prepared: Path, nnunet_folders: dict[str, Path]) -> Dataset:
    """Seven labelled cases, two without labels; two skull-stripped channels, normalised within the mask; some cases are
    resampled; labels 0, 1 and ignore, of which the last labelled case has nothing else."""
    name = f"Dataset{NUMBER}_Tiny"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(prepared / variable / name, nnunet_folders[variable] / name)
    return Dataset(name, nnunet_folders["nnUNet_raw"] / name, nnunet_folders["nnUNet_preprocessed"] / name)
