"""Runs in a fresh process (see test_discovery.py): nnU-Net's own look-up; the answers are the last line, as JSON."""

from __future__ import annotations

import json
import multiprocessing
import operator
import pickle
import sys


def caught(find, name: str) -> dict:
    try:
        return {"found": find(name).__module__}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "is_value_error": isinstance(error, ValueError)}


def main() -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

    names = sys.argv[1].split(",")
    first = {name: find(name) for name in names}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_worker = dict(zip(names, pool.map(operator.attrgetter("__name__"), first.values()), strict=True))
    answers = {
        name: {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "is_trainer": issubclass(cls, nnUNetTrainer) and cls is not nnUNetTrainer,
            "same_on_second_look_up": find(name) is cls,
            "same_after_pickling": pickle.loads(pickle.dumps(cls)) is cls,
            "name_in_spawned_worker": in_worker[name],
        }
        for name, cls in first.items()
    }
    for name in sys.argv[2].split(","):
        answers[name] = caught(find, name)
    print()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
