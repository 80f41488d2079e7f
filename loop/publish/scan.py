"""What a text must not carry away from this machine: tokens, keys, passwords, paths, its names."""

import getpass
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress

_SECRETS = {
    "token of the Hub": r"hf_\w{16,}",
    "API key": (
        r"\bsk-[\w-]{16,}|\b[rs]k_live_\w{10,}|\bAIza[\w-]{30,}|\bglpat-[\w-]{16,}"
        r"|\bxox[abeoprs]-[\w-]{10,}|\bnpm_\w{20,}|\bpypi-[\w-]{20,}"
        r"|\bSG\.[\w-]{10,}\.[\w-]{10,}|(?i:\bbearer )[\w.-]{16,}"
    ),
    "key of a cloud": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAccountKey=[\w+/=]{20,}",
    "token of GitHub": r"\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "web token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",
    "password in an address": (
        r"\b(?!mailto:)[\w.+-]+:(?://[^\s/:@]*:)?[^\s/:@]+@[\w-]+\.[\w.-]+|://[^\s/:@]+:[^\s/@]+@"
    ),
    "password": (
        r"(?i)(?:api[_-]?key|(?:secret|access)[_-]?key|auth[_-]?token|password|passwd)"
        r"(?:\\?['\"])?[ \t]*[:=][ \t]*(?:\\?['\"])?[^\s'\",]{8,}"
    ),
}
_PATHS = (
    r"(?<![\w./<>)~\]-])(?:file://|~)?/[\w.@+-]+(?:/[\w.@+-]+)+"
    r"|\b[A-Za-z]:(?:\\\\+|\\(?![nrt]))[\w.]"  # Q:\n is a question and its line's end
    r"|(?<!\\)(?:\\\\[\w.-]+\\|\\{4}[\w.-]+\\\\)(?!\\)"  # of a share, plain or as in JSON
)
_LINE_END = re.compile(r"(?<!\\)\\[nrt]")
"""Spelled as JSON, YAML and Python do: what stands behind it begins a word."""
_ANYBODY = {
    "root", "user", "admin", "ubuntu", "runner", "nobody", "docker", "jovyan",
    "localhost", "home", "host",
}  # fmt: skip
_NAME = "name of a user or machine"
_QUOTED = re.compile(r'\s*(>|"(adapter|base)": ")')
"""A line of a sample, in the card or in run.json: there somebody's name is the model's word."""


def findings(
    name: str, text: str, public: Iterable[str] = (), vocabulary: bool = False
) -> list[str]:
    """One line for each thing found, `name:line: what, masked`.

    `public` are words that may stand there, such as the repository's own id. A vocabulary is a list
    of everything that was ever written: there only secrets are looked for, not paths and names."""
    kinds = dict(_SECRETS) if vocabulary else {**_SECRETS, "absolute path": _PATHS}
    if not vocabulary and machine_names():
        names = "|".join(map(re.escape, sorted(machine_names(), reverse=True)))
        kinds[_NAME] = rf"(?<!\w)(?:{names})(?!\w)"
    text = _LINE_END.sub(r"\g<0> ", text)
    words = "|".join(re.escape(word) for word in sorted(public, key=len, reverse=True) if word)
    rest = re.sub(rf"(?<![\w-])(?:{words})(?![\w-])", " ", text) if words else text
    lines, hits = text.split("\n"), []
    for kind, pattern in kinds.items():
        # A secret, or a path, is one whatever public word is in it.
        searched = rest if kind == _NAME else text
        for match in re.finditer(pattern, searched):
            number = searched.count("\n", 0, match.start()) + 1
            if kind != _NAME or not _QUOTED.match(lines[number - 1]):
                hits.append((number, f"{name}:{number}: {kind}, {mask(match[0])}"))
    return [line for _, line in sorted(hits)]


def mask(secret: str) -> str:
    """Enough to find it in the file, too little to use it."""
    return secret[: min(4, len(secret) // 2)] + "****"


def machine_names() -> set[str]:
    """The user's and the machine's names, where they are not everybody's."""
    home = os.path.expanduser("~")  # where Path.home() raises, this is a ~
    names = {os.path.basename(home), socket.gethostname(), socket.gethostname().partition(".")[0]}
    with suppress(KeyError, OSError):  # no such user is listed, as in some containers
        names.add(getpass.getuser())
    return {name for name in names if len(name) > 2 and name.lower() not in _ANYBODY}
