"""Where a command runs, so that what it starts on other nodes works as if it stood there. Knows no Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__, settings
from ..errors import ClusterError

SECRETS = {"GOSSAMER_API_KEY", settings.JOIN_TOKEN}


def _said() -> dict[str, str]:
    """What the environment says to Gossamer, but for secrets."""
    said = {name: value for name, value in os.environ.items() if name.startswith("GOSSAMER_")}
    offline = {"HF_HUB_OFFLINE": "1"} if settings.offline() else {}
    return {name: value for name, value in (said | offline).items() if name not in SECRETS}


@dataclass(frozen=True)
class Place:
    """The working folder and the environment of this process, for a process elsewhere to take."""

    folder: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=_said)
    version: str = __version__

    def take(self, *files: Path) -> None:
        """Make this process stand there. Raises ClusterError: another version, a folder or file that it cannot see."""
        node = socket.gethostname()
        if self.version != __version__:
            raise ClusterError(f"{node} has gossamer {__version__}, not {self.version}", hint="install the same there")
        for path in (self.folder, *files):
            if not path.exists():
                raise ClusterError(f"{node} does not see {path}", hint="work in folders that all nodes share")
        os.environ.update(self.environment)
        os.chdir(self.folder)
