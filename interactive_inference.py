"""Makes a video whose prompt changes on the way: `python interactive_inference.py`, then type; --help lists the rest.

With `--prompts FILE` the prompts and where they follow each other come from a file. Without arguments the model is the
miniature that comes with the package.
"""

import sys

from longlive.__main__ import run

if __name__ == "__main__":
    sys.exit(run("live", sys.argv[1:], prog="interactive_inference.py"))
