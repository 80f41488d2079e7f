"""What a text must not carry away from this machine: tokens, keys, passwords, paths, and its names."""

import getpass
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_SECRETS = {
    "token of the Hub": r"\bhf_[A-Za-z0-9]{16,}",
    "API key": r"\bsk-[\w-]{16,}|\bAIza[\w-]{30,}|\bglpat-[\w-]{16,}|\bxox[abeoprs]-[\w-]{10,}",
    "key of a cloud": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAccountKey=[\w+/=]{20,}",
    "token of GitHub": r"\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",
    "password in an address": r"\b(?!mailto:)[\w.+-]+:(?://[^\s/:@]*:)?[^\s/:@]+@[\w-]+\.[\w.-]+|://[^\s/:@]+:[^\s/@]+@",
    "password": r"(?i)(?:api[_-]?key|secret[_-]?key|auth[_-]?token|password|passwd)['\"]?\s*[:=]\s*['\"]?[^\s'\",]{8,}",
}
_PATHS = r"(?<![\w.:/<>)~\]-])(?:file://|~)?/[\w.@+-]+(?:/[\w.@+-]+)+|\b[A-Za-z]:\\+[\w.]|\\\\[\w.-]+\\"
_ANYBODY = {"root", "user", "admin", "ubuntu", "runner", "nobody", "docker", "jovyan", "localhost", "home", "host"}
_QUOTED = re.compile(r'\s*(>|"(adapter|base)": ")')
"""A line of a sample, in the card or in run.json: there a word that is somebody's name is a word of the model's."""


def findings(name: str, text: str, public: Iterable[str] = (), vocabulary: bool = False) -> list[str]:
    """One line for each thing found, `name:line: what, masked`.

    `public` are words that may stand there, such as the repository's own id. A vocabulary is a list of everything that
    was ever written: there only secrets are looked for, not paths and names."""
    kinds = dict(_SECRETS) if vocabulary else {**_SECRETS, "absolute path": _PATHS}
    names = [] if vocabulary else [rf"(?<!\w){re.escape(word)}(?!\w)" for word in machine_names()]
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in sorted(public, key=len, reverse=True):
            line = line.replace(word, "")
        here = {**kinds, "name of a user or machine": "|".join(names)} if names and not _QUOTED.match(line) else kinds
        for kind, pattern in here.items():
            lines += [f"{name}:{number}: {kind}, {mask(match[0])}" for match in re.finditer(pattern, line)]
    return lines


def mask(found: str) -> str:
    """Enough to find it in the file, too little to use it."""
    return found[: min(4, len(found) // 2)] + "****"


def machine_names() -> set[str]:
    """The user's and the machine's names, where they are not everybody's."""
    names = {Path.home().name, socket.gethostname(), socket.gethostname().partition(".")[0]}
    with suppress(KeyError, OSError):  # no entry for this number in the list of users, as in some containers
        names.add(getpass.getuser())
    return {name for name in names if len(name) > 2 and name.lower() not in _ANYBODY}
