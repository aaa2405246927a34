"""Unlabelled images for nnU-Net's training loop: which cases they are, and a second stream of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from nnunet_diffext.data.dataset import dataset_id, unlabeled_folder
from nnunet_diffext.data.loaders import PairedLoader, augmenter
from nnunet_diffext.data.pool import UnlabeledDataset, UnlabeledPool, entirely_ignored, find_unlabeled
from nnunet_diffext.data.splits import Split, keep_labeled_percent, load_split, number_of_folds
from nnunet_diffext.data.transforms import TwoViews
from nnunet_diffext.data.unlabeled import made_with_other_plans, plans_fingerprint
from nnunet_diffext.trainers.base import DiffextTrainer


class SemiSupervisedTrainer(DiffextTrainer):
    """Adds ``batch["unlabeled"]`` ``(B, 2 C, *patch)``: a weak and a strong view of as many unlabelled patches.

    The settings of a subclass hold ``labeled_percent``. Labels of unlabelled cases are never read.
    """

    _split: Split | None = None

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the settings have a use for unlabelled images."""
        return True

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, without the training cases that count as unlabelled."""
        train, val = super().do_split()
        if self._split is None:
            self._split = self._semisupervised_split(train, val)
        return list(self._split.train), list(val)

    def _semisupervised_split(self, train: list[str], val: list[str]) -> Split:
        """The fold in ``splits_final.json``; cases without annotated voxels, or beyond the share, are unlabelled."""
        folder = self.preprocessed_dataset_folder_base
        split = Split(tuple(train), tuple(val))
        folds = number_of_folds(folder)
        if self.fold == "all":
            if any(load_split(folder, fold).unlabeled for fold in range(folds)):
                self.print_to_log_file("WARNING: fold 'all' trains on every label, also on those the split holds back.")
        elif self.fold < folds:
            split = load_split(folder, self.fold)
        elif any(load_split(folder, fold).unlabeled for fold in range(folds)):
            self.print_to_log_file(
                f"WARNING: the split has {folds} folds and none of number {self.fold}. nnU-Net draws one at random and "
                "trains on its labels, also on those that the split holds back."
            )
        ignored = set(entirely_ignored(self.preprocessed_dataset_folder, split.train, self.label_manager))
        annotated = tuple(i for i in split.train if i not in ignored)
        if not annotated:
            raise ValueError(
                f"Fold {self.fold} of {self.plans_manager.dataset_name} has no labelled training case: "
                f"{len(ignored)} hold the ignore label only. Annotate at least one case, or change splits_final.json."
            )
        split = Split(annotated, split.val, (*split.unlabeled, *sorted(ignored)))
        if self.settings.labeled_percent is not None:
            split = keep_labeled_percent(split, self.settings.labeled_percent)
        return split

    def _find_pool(self) -> UnlabeledPool:
        pool = find_unlabeled(
            self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier, self._split, self.fold,
            cascade_folder=self.folder_with_segs_from_previous_stage,
        )  # fmt: skip
        self._refuse_stale(pool)
        unused = "" if self.uses_unlabeled or not pool.cases else " The settings have no use for the latter."
        self.print_to_log_file(
            f"{len(self._split.train)} labelled and {len(pool.cases)} unlabelled training cases.{unused}"
        )
        if pool.without_previous_stage:
            self.print_to_log_file(
                f"{len(pool.without_previous_stage)} unlabelled cases are left out: the previous stage has not "
                f"segmented them into {self.folder_with_segs_from_previous_stage}. nnU-Net does so for the validation "
                "cases of a fold: train the previous stage on folds that validate on them. Images of imagesTu/ cannot "
                "be used in a cascade."
            )
        if not pool.cases:
            self.print_to_log_file(
                "No unlabelled images: the training is supervised. Put images into imagesTu/ and run "
                "'nnunet_diffext preprocess_unlabeled', or move labelled cases with 'nnunet_diffext split'."
            )
        return pool

    def _refuse_stale(self, pool: UnlabeledPool) -> None:
        """Images of the labelled folder are nnU-Net's own business.

        Raises:
            ValueError: images without labels were preprocessed with other plans, so that they look different.
        """
        plans = self.plans_manager
        folder = unlabeled_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        own = [case for case, where in pool.cases.items() if Path(where) == folder]
        stale = made_with_other_plans(folder, own, plans_fingerprint(plans, self.configuration_manager))
        if stale:
            raise ValueError(
                f"{len(stale)} images in {folder}, the first is {stale[0]}, were preprocessed with other plans than "
                f"{plans.plans_name} as they are now. Run: nnunet_diffext preprocess_unlabeled -d "
                f"{dataset_id(plans.dataset_name)} -plans_name {plans.plans_name} -c {self.configuration_name}"
            )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders; the training one also yields unlabelled patches if there are any and they are used."""
        train, val = super().get_dataloaders()
        pool = self._find_pool()
        if not pool.cases or not self.uses_unlabeled:
            return train, val
        num_processes = get_allowed_n_proc_DA()
        unlabeled = augmenter(
            self._unlabeled_loader(pool), num_processes and max(1, num_processes // 2), self.device.type == "cuda"
        )
        return PairedLoader(train, unlabeled), val

    def _unlabeled_loader(self, pool: UnlabeledPool) -> nnUNetDataLoader:
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        configuration = self.configuration_manager
        transforms = self.get_training_transforms(
            configuration.patch_size, rotation, None, mirror_axes, dummy_2d,
            use_mask_for_norm=configuration.use_mask_for_norm,
            is_cascaded=self.is_cascaded, foreground_labels=self.label_manager.foreground_labels,
        )  # fmt: skip
        dataset = UnlabeledDataset(pool.cases, self.folder_with_segs_from_previous_stage)
        return nnUNetDataLoader(
            dataset, self.batch_size, initial_patch_size, configuration.patch_size, self.label_manager,
            oversample_foreground_percent=0.0, transforms=TwoViews(transforms),
        )  # fmt: skip

    @staticmethod
    def views(unlabeled: Tensor) -> tuple[Tensor, Tensor]:
        """Weak and strong view ``(B, C, *patch)`` of ``batch["unlabeled"]``."""
        weak, strong = unlabeled.chunk(2, dim=1)
        return weak, strong

    def on_train_end(self) -> None:
        """Also stop the workers of the unlabelled stream."""
        if isinstance(self.dataloader_train, PairedLoader):
            paired, self.dataloader_train = self.dataloader_train, None
            paired.finish()
        super().on_train_end()
