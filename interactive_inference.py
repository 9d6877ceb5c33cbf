"""Makes a video whose prompt changes on the way: `python interactive_inference.py`, then type; --help lists the rest.

With `--prompts FILE` the prompts and where they follow each other come from a file. Without arguments the model is the
miniature that comes with the package.
"""

import sys
from pathlib import Path

from longlive.programs.inference import main

DESCRIPTION = "Makes a video whose prompt changes on the way: as a file of prompts says, or as you type."
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "miniature" / "interactive_inference.yaml"

if __name__ == "__main__":
    sys.exit(main(description=DESCRIPTION, default_config=DEFAULT_CONFIG, interactive=True))
