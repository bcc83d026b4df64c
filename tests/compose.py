"""docker-compose.yml as Docker Compose would read it, for tests that run its services' commands without containers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent
FILE = REPOSITORY / "docker-compose.yml"

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::-((?:[^{}]|\{[^{}]*\})*))?\})")


def read(**variables: str) -> dict[str, Any]:
    """The file, with these variables and no others set."""
    return _interpolated(yaml.safe_load(FILE.read_text()), variables)


def services(**variables: str) -> dict[str, dict[str, Any]]:
    return read(**variables)["services"]


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`${NAME}` and `${NAME:-default}` for what they stand for, `$$` for a dollar, in all that a value holds."""
    if isinstance(value, dict):
        return {key: _interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name is None:
            return "$"
        return variables.get(name) or _interpolated(default or "", variables)

    return _VARIABLE.sub(found, value)


def words(command: str | list[str]) -> list[str]:
    """A command as the arguments that the container's first process is given."""
    return shlex.split(command) if isinstance(command, str) else command
