"""Which prior speaks for which training case, how wrong it is, and what follows: corruption, kappa, a warning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Kind, make_architecture, make_batch, make_trainer
from tiny_prior import save_prior
from torch import Tensor, nn

from nnunet_diffext.data.prior_errors import ErrorSample, around_foreground
from nnunet_diffext.data.splits import Split
from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.pgrd import PGRDNet
from nnunet_diffext.stages import StageError
from nnunet_diffext.trainers import guided, priors
from nnunet_diffext.trainers.priors import PriorBank, out_of_fold
from nnunet_diffext.trainers.staged import build_network_of

FLAT = Kind((16, 16), ((1, 1), (2, 2)), features=(4, 8))


class Says(nn.Module):
    """A prior of one opinion: logit ``value`` for the foreground wherever the image is positive, else its opposite."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, image: Tensor) -> Tensor:
        logit = self.value * image.sign() / 2
        return torch.cat([-logit, logit], dim=1)


def net_around(prior: nn.Module) -> PGRDNet:
    torch.manual_seed(0)
    return PGRDNet(prior, make_architecture(FLAT), 1, LabelSpace(2))


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ out-of-fold
def test_out_of_fold() -> None:
    """A case belongs to a fold that trained neither on it nor on its image."""
    splits = {
        1: Split(("a", "b"), ("c",)),
        2: Split(("c", "b"), ("a",), ("d",)),
        3: Split(("a",), ("b", "c", "d")),
    }
    assert out_of_fold(["a", "b", "c", "d"], splits) == {"a": 2, "b": 3, "c": 1, "d": 1}
    assert out_of_fold(["a", "c"], {1: splits[1]}) == {"c": 1}
    assert out_of_fold(["a"], {}) == {}


@pytest.mark.parametrize("keys", [["x", "y", "x", "z"], np.array(["x", "y", "x", "z"])])
def test_every_case_gets_the_prior_of_its_fold(keys: Any) -> None:
    """nnU-Net hands out the keys of a batch as an array."""
    networks = {1: Says(1.0), 2: Says(2.0), 3: Says(3.0)}
    bank = PriorBank(net_around(Says(9.0)), "oof", networks, {"x": 1, "y": 2, "z": 3})
    p = bank(images(), keys)
    for row, value in enumerate((1.0, 2.0, 1.0, 3.0)):
        sure = torch.sigmoid(torch.tensor(value))
        torch.testing.assert_close(p[row, 1][images()[row, 0] > 0].unique(), sure[None])
    with pytest.raises(KeyError, match="unknown"):
        bank(images(1), ["unknown"])


def test_in_sample_prior_is_the_networks_own() -> None:
    assert PriorBank(net_around(Says(4.0)), "insample")(images(), ["x"] * 4) is None


def test_corrupted_prior() -> None:
    net = net_around(Says(4.0))
    plain = net.prior_probabilities(images())
    bank = PriorBank(net, "corrupted")
    assert torch.equal(bank(images(), []), plain)
    bank.strength = 0.3
    worse = bank(images(), [])
    torch.testing.assert_close(worse.sum(1), torch.ones(4, 16, 16))
    assert (worse - plain).abs().mean() > 0.05 and not torch.equal(worse, bank(images(), []))


# ------------------------------------------------------------------ error and kappa
def test_error_and_kappa_by_hand() -> None:
    """Voxels in the band of one foreground voxel, over two batches of different size; ignored voxels do not count."""
    net = net_around(Says(math.log(3)))  # 3 : 1, so residuals are 1/4 or 3/4
    sample = ErrorSample(net.as_prior, net.label_space.regions)
    signs, clean = torch.ones(3, 1, 16, 16), torch.zeros(3, 2, 16, 16)
    clean[:, 0] = 1
    clean[0, :, 8, 8] = torch.tensor([0.0, 1.0])
    clean[1, :, 0, 0] = torch.tensor([0.0, 1.0])
    valid = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    valid[0, :, 8, 5:8] = False
    for rows in (slice(0, 2), slice(2, 3)):
        sample.add(net.prior(signs[rows]), clean[rows], valid[rows])
    # foreground everywhere: wrong (3/4) but at two voxels (1/4). Bands: 7 x 7 less 3 ignored, and 4 x 4 at the corner
    right, wrong = 2, 49 - 3 - 1 + 16 - 1
    error = sample.error()
    assert error.band == pytest.approx((right / 4 + wrong * 3 / 4) / (right + wrong), abs=1e-5)
    assert error.kappa == pytest.approx(math.sqrt((right / 16 + wrong * 9 / 16) / (right + wrong)), abs=1e-5)
    total = 3 * 256 - 3
    assert error.everywhere == pytest.approx(math.sqrt((right / 16 + (total - right) * 9 / 16) / total), abs=1e-5)
    assert sample.error(0.4) == sample.error(0.4) != error


def test_without_foreground_nothing_is_known() -> None:
    net = net_around(Says(2.0))
    sample = ErrorSample(net.as_prior, net.label_space.regions)
    clean = torch.zeros(1, 2, 16, 16)
    clean[:, 0] = 1
    sample.add(net.prior(images(1)), clean, torch.ones(1, 1, 16, 16, dtype=torch.bool))
    assert all(math.isnan(v) for v in sample.error())


@pytest.mark.parametrize("regions", [False, True])
def test_band(regions: bool) -> None:
    clean = torch.zeros(1, 2, 12, 12, 9)
    clean[0, 1 if not regions else 0, 6, 6, 4] = 1
    band = around_foreground(clean, regions)
    assert band.shape == (1, 1, 12, 12, 9) and band.sum() == 7**3
    assert band[0, 0, 3:10, 3:10, 1:8].all()


# ------------------------------------------------------------------ networks of other trainers
@pytest.mark.parametrize(
    "name", ["nnUNetTrainer", "nnUNetTrainer_5epochs_lr1e-3", "nnUNetTrainerNoMirroring", "nnUNetTrainer_noDummy2DDA"]
)
def test_prior_of_any_trainer(name: str) -> None:
    """Ours, with tokens, and nnU-Net's own, some of which look like names with tokens."""
    manager = make_trainer(kind=FLAT).plans_manager
    network = build_network_of(name, manager, manager.get_configuration("2d"), 1, 2)
    assert network(images(1)).shape == (1, 2, 16, 16), "deep supervision is off"


def test_prior_of_an_unknown_trainer() -> None:
    manager = make_trainer(kind=FLAT).plans_manager
    with pytest.raises(ValueError, match="trained by MyTrainer, which nnU-Net cannot find. Install"):
        build_network_of("MyTrainer", manager, manager.get_configuration("2d"), 1, 2)


# ------------------------------------------------------------------ measured at the start of a training
def batches(trainer: Any, wrong: float, seed: int) -> Iterator[dict[str, Any]]:
    """The prior is wrong on a share of blocks of 4 x 4 voxels, as measured against the target."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        image = make_batch(trainer, unlabeled=False, seed=int(torch.randint(2**31, (), generator=generator)))["data"]
        with torch.no_grad():
            said = trainer.module.prior(image).argmax(1, keepdim=True)
        flip = torch.rand(len(image), 1, 4, 4, generator=generator) < wrong
        flip = flip.repeat_interleave(4, 2).repeat_interleave(4, 3)
        yield {"data": image, "target": (said ^ flip.long()).short(), "keys": np.array(["a", "b"])}


def measured(tokens: str, wrong_in_training: float, wrong_in_validation: float) -> tuple[Any, str]:
    """Trainer after the measurement that precedes a training, and what it said."""
    save_prior(kind=FLAT, gain=3.0)
    trainer = make_trainer(tokens, FLAT, base="PGRDTrainer")
    trainer.initialize()
    trainer.dataloader_train = batches(trainer, wrong_in_training, 1)
    trainer.dataloader_val = batches(trainer, wrong_in_validation, 2)
    trainer.stage = None  # there is no dataset whose folds could be looked at
    trainer.bank = trainer._prior_bank()
    said: list[str] = []
    trainer.print_to_log_file = lambda *args, **_: said.append(" ".join(map(str, args)))
    trainer._measure(set_scale=True)
    return trainer, "\n".join(said)


def test_too_good_a_prior_is_warned_about() -> None:
    trainer, said = measured("insample", 0.02, 0.4)
    assert "WARNING: the prior errs 0." in said and "train the prior on all folds" in said
    assert trainer.bank.kind == "insample" and trainer._strength is None


def test_no_warning_within_the_factor() -> None:
    _, said = measured("insample", 0.3, 0.3)
    assert "WARNING" not in said and "Prior (insample, corrupted by 0.000)" in said


def test_corruption_makes_up_for_the_difference() -> None:
    trainer, said = measured("corrupted", 0.1, 0.2)
    assert "WARNING" not in said
    assert 0 < trainer.bank.strength < 1 and trainer._strength == trainer.bank.strength
    assert trainer.extra_checkpoint()["diffext_prior_strength"] == trainer._strength
    resumed = make_trainer("corrupted", FLAT, base="PGRDTrainer")
    resumed.restore_extra(trainer.extra_checkpoint())
    assert resumed._strength == trainer._strength


def test_without_validation_cases_a_fixed_strength_is_used() -> None:
    save_prior(kind=FLAT, fold="all")
    trainer = make_trainer("", FLAT, base="PGRDTrainer", fold="all")
    trainer.initialize()
    trainer.dataloader_train = trainer.dataloader_val = batches(trainer, 0.1, 1)
    trainer.bank = trainer._prior_bank()
    trainer._measure(set_scale=True)
    assert trainer.bank.kind == "corrupted" and trainer.bank.strength == priors.BLIND_STRENGTH


def test_kappa_is_measured_around_the_foreground() -> None:
    trainer, said = measured("insample", 0.3, 0.3)
    sample = ErrorSample(trainer.module.as_prior, trainer.label_space.regions)
    source = batches(trainer, 0.3, 1)
    for _ in range(guided.MEASURED_BATCHES):
        batch = next(source)
        clean, valid = trainer.label_space.encode(batch["target"])
        with torch.no_grad():
            sample.add(trainer.module.prior(batch["data"]), clean, valid)
    error = sample.error()
    kappa = float(trainer.module.kappa)
    assert 0.02 < kappa < 1 and kappa == pytest.approx(error.kappa) and f"kappa {kappa:.3f}" in said
    assert float(trainer.module.spread) == pytest.approx(error.everywhere / kappa)


@pytest.mark.parametrize(("tokens", "kappa"), [("kappa0p4_insample", 0.4), ("paper", 1.0)])
def test_kappa_of_the_settings_wins(tokens: str, kappa: float) -> None:
    trainer, _ = measured(tokens, 0.3, 0.3)
    assert float(trainer.module.kappa) == pytest.approx(kappa)
    other = make_trainer("kappa0p3_noPGR", FLAT, base="PGRDTrainer")
    other.initialize()
    assert float(other.module.kappa) == pytest.approx(0.3), "also where nothing is measured"


# ------------------------------------------------------------------ a training that is continued
def continued(began_with: str) -> Any:
    """Trainer that has read a checkpoint of a training around such priors; no other fold of the prior is there."""
    save_prior(kind=FLAT)
    trainer = make_trainer("", FLAT, base="PGRDTrainer")
    trainer.initialize()
    trainer.restore_extra({"diffext_prior_kind": began_with, "diffext_prior_strength": 0.3})
    trainer.do_split = lambda: (["a", "b"], ["c"])
    return trainer


def test_continuing_keeps_the_kind_of_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the other folds are finished meanwhile: kappa was measured on corrupted ones."""
    trainer = continued("corrupted")
    monkeypatch.setattr(guided, "out_of_fold", lambda train, splits: dict.fromkeys(train, 1))
    trainer.bank = trainer._prior_bank()
    assert (trainer.bank.kind, trainer.bank.strength) == ("corrupted", 0.3)
    assert trainer.extra_checkpoint()["diffext_prior_kind"] == "corrupted"


def test_continuing_without_the_folds_that_it_began_with() -> None:
    trainer = continued("oof")
    trainer.stage = None
    with pytest.raises(StageError, match="began around out-of-fold priors.*nnUNet_diffext_prior"):
        trainer._prior_bank()
