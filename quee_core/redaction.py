"""Secrets out of what is logged: passwords in URLs, keys in their queries."""

import re
from typing import Any

# A password may hold a raw "/" or "@", so what stands before the last "@" goes: in the authority, or behind a
# colon that no port follows. No "[/" in it: Prefect's command, which shows a form's pattern, takes that for markup.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/?#\s\"'<>]*@|[^/?#\s\"'<>:@]*:(?!\d+(?:[?/#\s\"'<>]|$))[^\s\"'<>]*@)")
WITHOUT_LOGIN = f"^(?!.*(?:{_CREDENTIALS.pattern}))"  # for forms, which refuse it before it is sent and stored
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:password|passwd|pwd|secret|token|signature|credential|api[-_]?key|access[-_]?key)[\w.-]*|sig)=)"
    r"[^&;#\s\"'<>]*",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """`text` with `user:password@` cut out of every URL in it, and the values of secret query fields replaced by …."""
    return _QUERY.sub(r"\1…", _CREDENTIALS.sub("", text))


def redacted(value: Any) -> Any:
    """A plain value (mappings, sequences, scalars) with every text in it, keys apart, `without_secrets`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(inner) for inner in value)
    return value
