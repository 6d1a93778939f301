"""Clean text: what every parser passes its text through before anyone counts characters."""

import re
import unicodedata

# Line and paragraph separators of every platform become "\n".
_NEWLINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")

# Characters that are not seen but change what is read: zero-width characters and joiners, bidi controls, soft hyphen,
# Unicode tags and supplementary variation selectors (all used to hide instructions in documents), control
# characters, lone surrogates (JSON can carry them; UTF-8 and SQLite cannot) and non-characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def clean(text: str) -> str:
    """Newlines as "\\n", no invisible characters, NFC. `clean(clean(x)) == clean(x)`.

    Zero-width joiners go too: a joined emoji or a Persian word stays legible without them, and text that looks the
    same then is the same, which the content addresses downstream rely on.
    """
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", _NEWLINES.sub("\n", text)))


def clean_line(text: str) -> str:
    """`clean` for one-line strings (titles, headings, file names): whitespace runs become one space."""
    return " ".join(clean(text).split())
