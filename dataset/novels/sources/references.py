"""Decodes HTML character references that sites leave in raw text (&#20320; &#x4f60; &hellip;), once."""

from __future__ import annotations

import re
from html.entities import html5

# With their semicolon: without it, "&copy" may be a part of an address.
_REFERENCE = re.compile(
    r"&(?:#(?P<decimal>[0-9]{1,8})|#[xX](?P<hexadecimal>[0-9a-fA-F]{1,7})|(?P<name>[A-Za-z][A-Za-z0-9]{1,31}));"
)


def decode_references(text: str) -> str:
    """The text with each numeric and named reference replaced by its character.

    The result is not decoded again: "&amp;#39;" gives "&#39;". References to line ends give blanks, as in HTML; those
    to control characters, lone surrogates and unknown names are kept.

    >>> decode_references("&#x4f60;&#22909;&hellip; &amp;lt; &nosuch;")
    '你好… &lt; &nosuch;'
    """
    return _REFERENCE.sub(_decoded, text) if "&" in text else text


def _decoded(found: re.Match[str]) -> str:
    if found["name"]:
        character = html5.get(f"{found['name']};")
    else:
        number = int(found["decimal"] or found["hexadecimal"], 10 if found["decimal"] else 16)
        character = chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else None
    if character in ("\n", "\r", "\t"):
        return " "
    if character is None or (len(character) == 1 and not (" " <= character < "\x7f" or character >= "\xa0")):
        return found[0]
    return character
