"""Trains the main dataset and dies in the middle of its second checkpoint: half a file is on disk, no cleanup runs."""

from __future__ import annotations

import os
import signal
import sys

from nnunetv2.run.run_training import run_training
from workspace import CPU

from nnunet_diffext import files

_flush = os.fsync
_calls = 0


def die_in_the_second_write(descriptor: int) -> None:
    global _calls
    _calls += 1
    if _calls == 3:  # the first epoch writes checkpoint_latest and checkpoint_best
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    _flush(descriptor)


files.os.fsync = die_in_the_second_write
run_training(sys.argv[1], "3d_fullres", 0, sys.argv[2], device=CPU)
