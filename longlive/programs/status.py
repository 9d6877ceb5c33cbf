"""What a command of ours does with exceptions: a message instead of a traceback, and an exit status."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.parallel.world import configure_logging, get_world
from longlive.programs.loading import quiet_libraries

log = logging.getLogger(__name__)


def exit_status(command: Callable[[], int], *, interrupted: str) -> int:
    """Run a command with logging set up; SIGTERM interrupts it as Ctrl-C does, so that it can tidy up.

    Returns what it returns; 2 after ValueError or FileNotFoundError, the user's mistakes; 1 after what else stops a run; 130 after an
    interruption, which logs the sentence `interrupted`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        configure_logging(get_world())
        quiet_libraries()
        with logging_redirect_tqdm():
            return command()
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        log.warning("%s", interrupted)
        return 130


def _fail(error: Exception, status: int) -> int:
    log.error("error: %s", error.args[1] + f": {error.filename}" if isinstance(error, OSError) and error.filename else error)
    log.debug("raised here", exc_info=error)
    return status
