"""The secret by which the hosts of a run authenticate each other."""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

from novelgpt.settings.errors import UserError

VARIABLE, FILE_VARIABLE = "NOVELGPT_SECRET", "SECRET_FILE"
MIN_BYTES, MAX_BYTES = 16, 4096
MAKE = "head -c 32 /dev/urandom | base64"
MAKE_FILE = f"make one on one host: (umask 077; {MAKE} > secret), copy it to the others, and set SECRET_FILE=secret"
MAKE_VARIABLE = f'set it before srun, as scripts/slurm.sh does: export {VARIABLE}="$({MAKE})"'


def forget_secret(environment: MutableMapping[str, str]) -> tuple[str, str]:
    """Remove the secret and its file's name from variables, and return both."""
    return environment.pop(VARIABLE, ""), environment.pop(FILE_VARIABLE, "")


class GivenSecret:
    """The secret as the user gives it. It is removed from the environment at once, so that no process inherits it.

    Args:
        environment: of this process.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._value, self._file = forget_secret(environment)

    def read(self, slurm: bool) -> bytes:
        """Return the secret, of at least 16 bytes; a file takes precedence over the variable.

        Args:
            slurm: whether the hosts are tasks of Slurm, which have another remedy.

        Raises:
            UserError: there is none, it is short, or others can read its file.
        """
        remedy = MAKE_VARIABLE if slurm else MAKE_FILE
        if not self._file and not self._value:
            raise UserError("several hosts need a secret, by which they authenticate each other", remedy)
        secret = _content(Path(self._file), remedy) if self._file else self._value.encode("utf-8", "surrogateescape")
        secret = secret.strip()
        if not MIN_BYTES <= len(secret) <= MAX_BYTES:
            name = f"{FILE_VARIABLE}={self._file}" if self._file else VARIABLE
            raise UserError(f"{name}: a secret has {MIN_BYTES} to {MAX_BYTES} bytes, not {len(secret)}", remedy)
        return secret


def _content(path: Path, remedy: str) -> bytes:
    try:
        # Do not wait for the writer of a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise UserError(f"{FILE_VARIABLE}={path}: {error}", remedy) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{FILE_VARIABLE}={path} is not a regular file", remedy)
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{FILE_VARIABLE}={path} can be read or changed by others", f"chmod 600 {path}")
    return content
