"""Makes videos from prompts: `python inference.py --prompt "…" --seconds 10`; --help lists the rest.

Without arguments the miniature that comes with the package makes the videos of configs/miniature/inference.yaml.
"""

import sys

from longlive.__main__ import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:], prog="inference.py"))
