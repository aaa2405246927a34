"""Makes ``denoisers`` importable: pytest does not put the folders of test files on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
