"""Addresses as they may be shown: without the user and password that some carry."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


def without_credentials(text: str) -> str:
    """`text` with user and password taken out of every address in it."""
    return _CREDENTIALS.sub("", text)
