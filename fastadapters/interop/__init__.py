"""Other people's adapters on our ops: `patch`, one file for each client. No client is imported."""

from .patching import Report, patch

__all__ = ["Report", "patch"]
