"""One process at a time: a lock on an open file, which the system lets go of whatever becomes of the process."""

import errno
import fcntl
import sys
from typing import IO

from .errors import LinearizeError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def lock(file: IO, refusal: LinearizeError) -> None:
    """Holds a file until it is closed or this process ends, however. Raises `refusal` where another process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise refusal from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {file.name}: its file system has no locks ({error}), so nothing keeps another process from "
              "doing the same work", file=sys.stderr)  # fmt: skip
