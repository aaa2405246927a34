from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.data.prompts import KEY, PromptError, dataset_prompts, parse_change, prompts_for, with_changes
from synthetic import make_raw_dataset

LABELS = {"background": 0, "left_kidney": 2, "liver": 1, "ignore": 3}
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
OWN = {"left_kidney": "the kidney on the left", "liver": "a liver"}


def dataset(labels: dict[str, Any] = LABELS, channels: tuple[str, ...] = ("CT",), **diffext: Any) -> dict[str, Any]:
    content = {"labels": labels, "channel_names": {str(i): name for i, name in enumerate(channels)}}
    return content | ({"diffext": diffext} if diffext else {})


# --------------------------------------------------------------------------------------------------------- template


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (("CT",), "CT image of the left kidney"),
        (("T1", "FLAIR"), "T1 and FLAIR image of the left kidney"),
        (("R", "G", "B"), "R, G and B image of the left kidney"),
        (("T1_post__contrast",), "T1 post contrast image of the left kidney"),
        (("MRI", "MRI"), "MRI image of the left kidney"),
        (("noNorm", "CT", "rescale_to_0_1"), "CT image of the left kidney"),
        (("zscore",), "image of the left kidney"),
    ],
)
def test_template(channels: tuple[str, ...], text: str) -> None:
    assert prompts_for(dataset(channels=channels))["left_kidney"] == text


def test_template_reads_the_old_key_of_the_channels() -> None:
    assert prompts_for({"labels": {"background": 0, "a": 1}, "modality": {"0": "PET"}}) == {"a": "PET image of the a"}


@pytest.mark.parametrize(
    ("labels", "order"), [(LABELS, ["liver", "left_kidney"]), (REGIONS, ["whole tumor", "core", "enhancing"])]
)
def test_one_prompt_per_head_in_the_order_of_the_heads(labels: dict[str, Any], order: list[str]) -> None:
    manager = LabelManager(labels, [1, 2, 3] if labels is REGIONS else None)
    heads = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    found = foreground(dataset(labels))
    assert list(prompts_for(dataset(labels))) == list(found) == order
    assert list(found.values()) == [head if isinstance(head, tuple) else (head,) for head in heads]


@pytest.mark.parametrize("labels", [{}, {"background": 0}, {"background": 0, "nothing": [0, 0], "ignore": 1}])
def test_no_foreground(labels: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no label but background"):
        prompts_for(dataset(labels))


def test_two_names_for_one_head() -> None:
    labels = {"background": 0, "c": 2, "a": 1, "b": 1}
    with pytest.raises(ValueError, match="two names for one value"):
        prompts_for(dataset(labels))
    assert foreground(dataset(labels), unique=False) == {"b": (1,), "c": (2,)}
    assert len(LabelManager(labels, None).foreground_labels) == 2, "one name for every head"


# ------------------------------------------------------------------------------------------------------ dataset.json


def test_own_prompts_in_the_order_of_the_heads() -> None:
    found = prompts_for(dataset(prompts=OWN | {"liver": " a liver\n"}, modalities={}))
    assert list(found.items()) == [("liver", "a liver"), ("left_kidney", "the kidney on the left")]


def test_another_key_beside_the_prompts() -> None:
    assert prompts_for(dataset(modalities={})) == prompts_for(dataset())


def test_prompts_for_labels_that_do_not_exist() -> None:
    with pytest.raises(PromptError) as caught:
        prompts_for(dataset(prompts=OWN | {"spleen": "a spleen", "background": "nothing"}))
    message = str(caught.value)
    assert KEY in message and "no label 'spleen', 'background'" in message and "'liver', 'left_kidney'" in message


def test_labels_without_a_prompt_can_be_pasted() -> None:
    with pytest.raises(PromptError, match="no prompt for left_kidney") as caught:
        prompts_for(dataset(prompts={"liver": "a liver"}))
    assert KEY in str(caught.value)
    pasted = json.loads(str(caught.value)[str(caught.value).index("{") :])
    assert prompts_for(dataset(prompts={"liver": "a liver"} | pasted))["left_kidney"] == "CT image of the left kidney"


@pytest.mark.parametrize("text", ["", "  ", None, 3, ["a liver"]])
def test_no_text(text: Any) -> None:
    with pytest.raises(PromptError, match="prompt of 'liver' must be a text that is not empty") as caught:
        prompts_for(dataset(prompts=OWN | {"liver": text}))
    assert KEY in str(caught.value)


@pytest.mark.parametrize("block", [["a liver"], "a liver", None])
def test_blocks_of_another_type(block: Any) -> None:
    with pytest.raises(PromptError, match="must be a dictionary, such as .*CT image of the liver") as caught:
        prompts_for(dataset(prompts=block))
    assert KEY in str(caught.value)
    with pytest.raises(PromptError, match=r'dataset.json\["diffext"\] must be a dictionary'):
        prompts_for(dataset() | {"diffext": block})


# ----------------------------------------------------------------------------------------------------------- changes


def test_changes() -> None:
    prompts = prompts_for(dataset())
    changed = with_changes(prompts, dict([parse_change(" liver = a liver, x=1 ")]))
    assert changed == {"liver": "a liver, x=1", "left_kidney": "CT image of the left kidney"}
    assert list(changed) == list(prompts) and prompts["liver"] == "CT image of the liver"


@pytest.mark.parametrize("text", ["liver", "=a liver", "liver=", "liver= "])
def test_no_change(text: str) -> None:
    with pytest.raises(PromptError, match="Write LABEL=text"):
        parse_change(text)


def test_changes_are_checked() -> None:
    prompts = prompts_for(dataset())
    with pytest.raises(PromptError, match="no label 'Liver'.*'liver', 'left_kidney'"):
        with_changes(prompts, {"Liver": "a liver"})
    with pytest.raises(PromptError, match="not empty"):
        with_changes(prompts, {"liver": " "})


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def raw(nnunet_folders: dict[str, Path]) -> Path:
    return make_raw_dataset(nnunet_folders["nnUNet_raw"], 952, "Prompts", cases=1, shape=(8, 8, 8)) / "dataset.json"


def write(file: Path, **prompts: str) -> None:
    content = json.loads((file if file.is_file() else next(file.parents[2].rglob("dataset.json"))).read_text())
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content | ({"diffext": {"prompts": prompts}} if prompts else {})))


def printed_block(text: str) -> dict[str, str]:
    return json.loads(text[text.index("\n{") : text.rindex("}") + 1])["diffext"]["prompts"]


def test_verb_prints_the_template_and_the_block(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "-d", "952"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Prompts from the template ({raw} has none):\n  ball: MR image of the ball\n")
    assert printed_block(printed) == {"ball": "MR image of the ball"}


def test_verb_prints_own_prompts(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(raw, ball="ein heller Ball, größer als 1 cm")
    assert main(["prompts", "-d", "Dataset952_Prompts"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Prompts from {raw}:\n  ball: ein heller Ball, größer als 1 cm\n")
    assert "other prompts" not in printed


def test_the_file_that_trainings_read_wins(
    raw: Path, nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    preprocessed = nnunet_folders["nnUNet_preprocessed"] / raw.parent.name / "dataset.json"
    write(preprocessed)
    assert dataset_prompts(952).unread is None
    write(raw, ball="a ball")
    found = dataset_prompts(952)
    assert (found.file, found.own, found.unread) == (preprocessed, False, raw)
    assert main(["prompts", "-d", "952"]) == 0
    assert f"{raw} has other prompts, which trainings do not read" in capsys.readouterr().out


def test_verb_names_the_file_of_a_wrong_block(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(raw, bell="a bell")
    assert main(["prompts", "-d", "952"]) == 1
    assert f"error: {raw}: {KEY}: there is no label 'bell'" in capsys.readouterr().err


def test_verb_without_dataset(nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "-d", "952"]) == 1
    assert "952" in capsys.readouterr().err
