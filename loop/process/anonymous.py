"""The Hub without a login: no token of the user's, no word about what this program runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

_SWITCHES = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY")
"""Attributes of the client's `constants`, all true within `anonymous`.

Without the first, transformers 5.23 lists a repository's files with the login's token,
`token=False` or not. Without the second, the client names torch's version and what it runs under,
and asks the Hub for a list of such names."""


@contextmanager
def anonymous() -> Iterator[None]:
    """Within it no call of the Hub's client carries a token that was not passed.

    The client reads its environment once, at its import, and these two again at each call.
    After it all is as it was."""
    before = {name: getattr(constants, name) for name in _SWITCHES}
    try:
        for name in _SWITCHES:
            setattr(constants, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
