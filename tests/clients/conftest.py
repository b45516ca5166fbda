"""The clients themselves, in the versions that `make test-clients` installs under build."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

PACKAGES = {
    "test_adapter_hub.py": "adapters",
    "test_open_clip.py": "open_clip",
    "test_torchscale.py": "torchscale",
}
collect_ignore = [
    file for file, package in PACKAGES.items() if importlib.util.find_spec(package) is None
]
