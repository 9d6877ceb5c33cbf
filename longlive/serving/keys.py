"""The two secrets of a session. Knows nothing about connections.

A session's name is public. Whoever has its owner's key may type, pause, restart and end it; whoever has its watcher's key may watch it.
Either of them gives its recordings and timelines. A key is a keyed digest of role and name, so the server keeps none of them, and they
are valid after a restart of the server.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Literal

Role = Literal["owner", "watcher"]
SECRET_BYTES = 32


class Keys:
    """Makes and checks the keys of all sessions whose files are in `folder`, from the secret that is kept there.

    Raises ValueError when the secret can be neither read nor made.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".sessions.secret"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._secret = _read_or_make(path)
        except OSError as error:
            raise ValueError(f"cannot keep the secret of the sessions in {path}: {error.strerror}; choose another --output") from error
        if len(self._secret) != SECRET_BYTES:
            raise ValueError(f"{path} is not a secret of {SECRET_BYTES} bytes; remove it (earlier recordings can then not be downloaded)")

    def key(self, role: Role, session: str) -> str:
        """The key of a role in a session."""
        digest = hmac.digest(self._secret, f"{role}:{session}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest[:18]).decode()

    def role(self, session: str, key: str | None) -> Role | None:
        """What a key gives in a session; None when it is missing or wrong. The time does not depend on how a wrong one differs."""
        found: Role | None = None
        roles: tuple[Role, ...] = ("owner", "watcher")
        for role in roles:
            if secrets.compare_digest(self.key(role, session).encode(), (key or "").encode(errors="replace")):
                found = role
        return found


def _read_or_make(path: Path) -> bytes:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with open(handle, "wb") as file:
        file.write(secret := secrets.token_bytes(SECRET_BYTES))
    return secret
