"""Secrets are taken out of whatever is written: keys of services, logins in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
SECRET_WORDS = frozenset({"key", "apikey", "token", "password", "secret"})
URL_LOGIN = re.compile(r"(\w://)[^/\s@]+@")
URL_FIELD = re.compile(r"([?&][\w-]*(?:key|token|password|secret)=)[^&#\s]+", re.IGNORECASE)
TEXT_TOKENS = frozenset("bos eos pad unk sep cls mask stop prefix".split())
"""First words of `eos_token` and the like, which are text and no secrets."""


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy without secrets: values of keys that end in key, token, password or secret, and
    the login and such query fields of URLs inside any text."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: REDACTED if is_secret(str(k)) else clean(v) for k, v in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return [clean(item) for item in value]
        return redact_text(value) if isinstance(value, str) else value

    cleaned: dict[str, Any] = clean(config)
    return cleaned


def redact_text(text: str) -> str:
    """Text whose URLs carry neither a login (`https://name:secret@host`) nor a secret field."""
    return URL_FIELD.sub(rf"\1{REDACTED}", URL_LOGIN.sub(rf"\1{REDACTED}@", text))


def is_secret(key: str) -> bool:
    """True for `token`, `hf_token`, `apiKey`; False for `tokens`, `max_tokens`, `eos_token`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]
    if not words or words[-1] not in SECRET_WORDS:
        return False
    return not (len(words) > 1 and words[-1] == "token" and words[-2] in TEXT_TOKENS)
