"""nnU-Net's own look-up finds the trainers, in a process that knows of them only through nnUNet_extTrainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import describe_tokens

SCRIPT = Path(__file__).parent / "discovery_script.py"
# nnU-Net's own nnUNetTrainer is found before ours, by design; its variants are ours.
BARE = [name for name in TRAINERS if name != "nnUNetTrainer"]
VARIANTS = [f"{name}_3epochs_seed7_lr1e-3" for name in TRAINERS]
OTHERS = ["DMEDSegTrainer_noSuchToken", "NoSuchTrainer", "UserTrainer", "nnUNetTrainer_ofTheUser"]

USER_MODULE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class UserTrainer(nnUNetTrainer): pass
class nnUNetTrainer_ofTheUser(nnUNetTrainer): pass
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every answer from one fresh process; the user's own directory stands before ours, as ``enable`` leaves it."""
    user = tmp_path_factory.mktemp("user_trainers")
    (user / "user_module.py").write_text(USER_MODULE)
    command = [Path(sys.executable).with_name("nnunet_diffext"), "trainer_dir"]
    ours = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    done = subprocess.run(
        [sys.executable, SCRIPT, ",".join(BARE + VARIANTS), ",".join(OTHERS)],
        env={**os.environ, "nnUNet_extTrainer": os.pathsep.join([str(user), ours])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BARE + VARIANTS)
def test_found_importable_and_picklable(answers: dict[str, dict], name: str) -> None:
    answer = answers[name]
    assert answer["module"].split(".")[0] == "nnunet_diffext"
    assert answer["class_name"] == answer["name_in_spawned_worker"] == name
    assert answer["is_trainer"] and answer["same_on_second_look_up"] and answer["same_after_pickling"]


def test_unknown_token_lists_the_tokens(answers: dict[str, dict]) -> None:
    answer = answers["DMEDSegTrainer_noSuchToken"]
    assert (answer.get("error"), answer.get("is_value_error")) == ("UnknownTokenError", True)
    assert "noSuchToken" in answer["message"]
    patterns = [token.pattern for token in describe_tokens(find_trainer("DMEDSegTrainer").Settings)]
    assert patterns and [p for p in patterns if p not in answer["message"]] == []


def test_unknown_trainer_is_left_to_nnunet(answers: dict[str, dict]) -> None:
    answer = answers["NoSuchTrainer"]
    assert answer["error"] == "RuntimeError"
    assert answer["message"].startswith("Could not find requested nnunet trainer NoSuchTrainer")


@pytest.mark.parametrize("name", ["UserTrainer", "nnUNetTrainer_ofTheUser"])
def test_trainers_of_the_user_stay_reachable(answers: dict[str, dict], name: str) -> None:
    assert answers[name] == {"found": "user_module"}
