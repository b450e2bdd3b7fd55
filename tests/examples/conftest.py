"""Makes the modules of docs/examples importable, as they are for a script there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
