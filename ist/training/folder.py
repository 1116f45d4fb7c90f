"""The run folder while a process has it: made, locked, and gone again where nothing was written to it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ist.distributed import from_main
from ist.training.command_line import UsageError


@contextmanager
def held_folder(output_dir: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out until it is left. All ranks enter; the main process holds it.

    Before anybody looks into it: what is there could change otherwise. A folder that was made and is still empty when
    it is left, as the input was bad, is removed.

    Raises:
        UsageError: another process has it, it is a file, or it cannot be made.
    """
    held: list[tuple[int, list[Path]]] = []
    from_main(lambda: held.append(_take(output_dir)), UsageError)
    try:
        yield
    finally:
        for descriptor, made in held:
            for folder in made:
                try:
                    folder.rmdir()
                except OSError:  # not empty
                    break
            os.close(descriptor)


def _take(folder: Path) -> tuple[int, list[Path]]:
    """(its descriptor, which holds the lock; the folders that had to be made, the innermost first)."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # A launcher that was killed may have left its last process running.
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"--output_dir {folder} is being written by another process that is still running.") from error
    except OSError:  # a file system without locks
        pass
    return descriptor, made
