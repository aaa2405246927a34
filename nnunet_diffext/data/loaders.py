"""One iterator over labelled and unlabelled batches, as nnU-Net's training loop wants it."""

from __future__ import annotations

from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

Augmenter = NonDetMultiThreadedAugmenter | SingleThreadedAugmenter


def augmenter(loader: nnUNetDataLoader, num_processes: int, pin_memory: bool) -> Augmenter:
    """Background workers around a data loader, or none of them, by nnU-Net's rules."""
    if num_processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=num_processes,
        num_cached=max(3, num_processes // 2),
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
    )


class PairedLoader:
    """Yields nnU-Net's labelled batch with the unlabelled one as ``"unlabeled"``, its cases as ``"unlabeled_keys"``.

    Args:
        labeled, unlabeled: two running augmenters.
    """

    def __init__(self, labeled: Augmenter, unlabeled: Augmenter) -> None:
        self.labeled, self.unlabeled = labeled, unlabeled

    def __next__(self) -> dict[str, Any]:
        unlabeled = next(self.unlabeled)
        return {**next(self.labeled), "unlabeled": unlabeled["data"], "unlabeled_keys": unlabeled["keys"]}

    def finish(self) -> None:
        """Stop the workers of both."""
        for loader in (self.labeled, self.unlabeled):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()
