"""The clients themselves, in the versions that `make test-clients` installs under build/clients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

collect_ignore_glob = [] if importlib.util.find_spec("adapters") else ["test_*.py"]
