from __future__ import annotations

import pickle
from typing import Any

import pytest

from nnunet_diffext.data.modalities import ANNOTATED_KEY, KEY, Modalities, ModalityError, modalities_of

LABELS = {"background": 0, "tumour": 3, "liver": 1, "spleen": 2, "ignore": 4}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
CASES = {"b": "MR", "a": "CT", "c": "MR", "d": "CT"}


def dataset(labels: dict[str, Any] = LABELS, channel: str = "CT", **diffext: Any) -> dict[str, Any]:
    return {"labels": labels, "channel_names": {"0": channel}} | ({"diffext": diffext} if diffext else {})


def modalities(annotated: Any = None, cases: Any = CASES, **kwargs: Any) -> Modalities:
    return modalities_of(dataset(modalities=cases, **({} if annotated is None else {"annotated": annotated}), **kwargs))


def test_names_and_indices_follow_the_file_not_the_alphabet() -> None:
    found = modalities()
    assert found.names == ("MR", "CT") and found.of_case == CASES
    assert [found.index(case) for case in "abcd"] == [1, 0, 0, 1]


def test_heads_are_background_and_labels_by_value() -> None:
    assert modalities().heads == ("background", "liver", "spleen", "tumour")


def test_absent_keys_mean_every_label() -> None:
    found = modalities({"MR": ["liver"]})
    assert found.annotated("a") == (True, True, True, True) == found.classes("CT")
    assert found.annotated("b") == (True, True, False, False) == found.classes("MR")


def test_a_case_wins_and_classes_are_the_union_over_the_cases() -> None:
    found = modalities({"MR": ["liver"], "c": ["tumour"], "a": ["spleen", "liver"], "d": ["spleen"]})
    assert found.annotated("b") == (True, True, False, False)
    assert found.annotated("c") == (True, False, False, True)
    assert found.classes("MR") == (True, True, False, True)
    assert found.classes("CT") == (True, True, True, False)


def test_regions_have_no_background_head() -> None:
    found = modalities({"MR": ["core"]}, labels=REGIONS)
    assert found.heads == ("whole", "core")
    assert (found.annotated("b"), found.annotated("a")) == ((False, True), (True, True))


@pytest.mark.parametrize(
    ("channel", "name"), [("CT", "CT"), ("T1 post/contrast", "T1_post_contrast"), ("zscore", "image"), ("?", "image")]
)
def test_without_the_block_there_is_one_modality(channel: str, name: str) -> None:
    for content in (dataset(channel=channel), dataset(channel=channel, prompts={})):
        found = modalities_of(content)
        assert found.names == (name,) and found.index("anything") == 0
        assert found.annotated("anything") == (True,) * 4 == found.classes(name)


def test_no_channel_at_all() -> None:
    assert modalities_of({"labels": LABELS}).names == ("image",)


def test_survives_pickling() -> None:
    found = modalities({"MR": ["liver"]})
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_case_without_modality() -> None:
    found = modalities({"MR": ["liver"]})
    for ask in (found.modality, found.index, found.annotated):
        with pytest.raises(ModalityError, match="no modality for the case 'e'.*MR, CT") as caught:
            ask("e")
        assert KEY in str(caught.value)
    with pytest.raises(ModalityError, match="no modality 'PET'; the modalities are MR, CT"):
        found.classes("PET")


@pytest.mark.parametrize("name", ["", " ", "MR T1", "MR/T1", "MR.T1", "MR\n", "Ä", 3, None, ["MR"]])
def test_names_that_are_not_allowed(name: Any) -> None:
    with pytest.raises(ModalityError, match="is no name of a modality. Use letters, digits") as caught:
        modalities(cases={"a": "CT", "b": name})
    assert f"{KEY}, case 'b'" in str(caught.value)


@pytest.mark.parametrize("name", ["MR-T1", "MR_T1+c", "3"])
def test_names_that_are_allowed(name: str) -> None:
    assert modalities(cases={"a": name}).names == (name,)


@pytest.mark.parametrize("block", [["CT"], "CT", None, 1])
def test_blocks_of_another_type(block: Any) -> None:
    with pytest.raises(ModalityError, match="must be a dictionary, such as") as caught:
        modalities_of(dataset(modalities=block))
    assert KEY in str(caught.value)
    if block is not None:
        with pytest.raises(ModalityError, match="must be a dictionary.*tumour") as caught:
            modalities(block)
        assert ANNOTATED_KEY in str(caught.value)
    with pytest.raises(ModalityError, match=r'dataset.json\["diffext"\] must be a dictionary'):
        modalities_of(dataset() | {"diffext": block})


@pytest.mark.parametrize(
    ("annotated", "message"),
    [
        ({"MR": ["lung"]}, r'\["MR"\]: \'lung\' cannot be annotated. The labels are \'liver\', \'spleen\', \'tumour\''),
        ({"MR": ["ignore"]}, "'ignore' cannot be annotated"),
        ({"MR": ["background", "liver"]}, "'background' cannot be annotated"),
        ({"PET": ["liver"]}, "'PET' is neither a modality \\('MR', 'CT'\\) nor a case"),
        ({"e": ["liver"]}, "'e' is neither a modality"),
        ({"MR": []}, r'\["MR"\] is empty'),
        ({"a": []}, r'\["a"\] is empty'),
        ({"MR": "liver"}, "must be a list of names of labels"),
        ({"MR": [1]}, "must be a list of names of labels"),
        ({"MR": None}, "must be a list of names of labels"),
        ({"MR": ["liver"], "CT": ["liver", "spleen"], "a": ["liver"]}, "no case has 'tumour' annotated"),
    ],
)
def test_annotated_is_checked(annotated: Any, message: str) -> None:
    with pytest.raises(ModalityError, match=message) as caught:
        modalities(annotated)
    assert ANNOTATED_KEY in str(caught.value)


def test_modalities_without_cases_and_annotated_without_modalities() -> None:
    with pytest.raises(ModalityError, match="names no case"):
        modalities(cases={})
    with pytest.raises(ModalityError, match="which says which cases there are"):
        modalities_of(dataset(annotated={"CT": ["liver"]}))


def test_a_name_that_is_a_modality_and_a_case() -> None:
    with pytest.raises(ModalityError, match="'CT' is the name of a modality and of a case"):
        modalities(cases={"CT": "MR", "a": "CT"})
