"""Expands `~`, `$NAME` and `${NAME}` in paths of YAML and overrides. Paths of command-line options are not expanded."""

from __future__ import annotations

import os
import re

from sdit.redact import is_secret_name

_VARIABLE = re.compile(r"\$(?:(\$)|\{([^}]*)\}?|([A-Za-z_]\w*))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand_path(text: str) -> str:
    """Return `text` with a leading `~` or `~user` and all variables replaced. `$$` is a dollar sign.

    Raises: ValueError: if a user is unknown, or a variable is not set or holds a secret. The message is for users.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] if match[3] is None else match[3]
        if not _NAME.fullmatch(name) or (match[3] is None and not match[0].endswith("}")):
            raise ValueError(f"{match[0]!r} is not a variable; legal: $NAME or ${{NAME}}, and $$ for a dollar sign")
        if is_secret_name(name):
            raise ValueError(f"${name} may hold a secret, and a path is written to the run's files; legal: another one")
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set; legal: a variable that is, or $$ for a dollar sign")
        return os.environ[name]

    return _VARIABLE.sub(value_of, _expand_home(text))


def _expand_home(text: str) -> str:
    home = text.partition("/")[0]
    if not home.startswith("~"):
        return text
    expanded = os.path.expanduser(home)
    if expanded == home:
        known = "the home folder is not known" if home == "~" else f"{home!r} is not the home of a user"
        raise ValueError(f"{known}; legal: a full path, or ./~... for a folder of that name")
    return expanded.replace("$", "$$") + text[len(home) :]


def escape_path(text: str) -> str:
    """Return text that `expand_path` converts back to the path `text`."""
    return ("./" if text.startswith("~") else "") + text.replace("$", "$$")
