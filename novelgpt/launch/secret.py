"""The secret by which the hosts of a run authenticate each other."""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping

from novelgpt.settings.errors import UserError

VARIABLE, FILE_VARIABLE = "NOVELGPT_SECRET", "SECRET_FILE"
MIN_BYTES, MAX_BYTES = 16, 4096
MAKE = "head -c 32 /dev/urandom | base64"
MAKE_FILE = f"make one on one host: (umask 077; {MAKE} > secret), copy it to the others, and set SECRET_FILE=secret"
MAKE_VARIABLE = f'set it before srun, as scripts/slurm.sh does: export {VARIABLE}="$({MAKE})"'


def forget_secret(environment: MutableMapping[str, str]) -> tuple[str, str]:
    """Remove the secret and its file's name from variables, so that no process inherits them, and return both."""
    return environment.pop(VARIABLE, ""), environment.pop(FILE_VARIABLE, "")


def read_secret(value: str, path: str, slurm: bool) -> bytes:
    """Return the secret, of at least 16 bytes; a file takes precedence over the variable.

    Args:
        value: of the variable; "" for none.
        path: of the file; "" for none.
        slurm: whether the hosts are tasks of Slurm, which have another remedy.

    Raises:
        UserError: there is none, it is short, or others can read its file.
    """
    remedy = MAKE_VARIABLE if slurm else MAKE_FILE
    if not path and not value:
        raise UserError("several hosts need a secret, by which they authenticate each other", remedy)
    name, secret = VARIABLE, value.encode("utf-8", "surrogateescape")
    if path:
        name = f"{FILE_VARIABLE}={path}"
        try:
            # Do not wait for the writer of a pipe.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                mode = os.fstat(file.fileno()).st_mode
                secret = file.read(MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise UserError(f"{name}: {error}", remedy) from error
        if not stat.S_ISREG(mode):
            raise UserError(f"{name} is not a regular file", remedy)
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{name} can be read or changed by others", f"chmod 600 {path}")
    secret = secret.strip()
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise UserError(f"{name}: a secret has {MIN_BYTES} to {MAX_BYTES} bytes, not {len(secret)}", remedy)
    return secret
