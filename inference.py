"""Makes videos from prompts: `python inference.py --prompt "…" --seconds 10`; --help lists the rest.

Without arguments the miniature that comes with the package makes the videos of configs/miniature/inference.yaml.
"""

import sys
from pathlib import Path

from longlive.programs.inference import main

DESCRIPTION = "Makes videos from prompts, each of any length, each prompt in a file a video of its own."
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "miniature" / "inference.yaml"

if __name__ == "__main__":
    sys.exit(main(description=DESCRIPTION, default_config=DEFAULT_CONFIG))
