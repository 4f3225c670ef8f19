"""The model that is served when none is given: a small convolutional net for handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Final

BUNDLED_MODELS: Final = Path(__file__).parent / "models"
