"""Texts that a script makes of other files with cat, echo and sed, as templates of configurations are filled in.

Of sed only substitutions are followed ("s/OLD/NEW/g") whose pattern is plain text, with "." for any character. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from moeplan.exporters.reading.substitution import simple_output

_SUBSTITUTION = re.compile(r"\s*s([/|#,:@%!~])((?:\\.|(?!\1)[^\\])*)\1((?:\\.|(?!\1)[^\\])*)\1(g?)\s*(?:;|\n|$)", re.DOTALL)


def piped(steps: Sequence[Sequence[str]], read: Callable[[str], str | None]) -> str | None:
    """What a pipeline of commands prints; None where that is not known. `read` gives the text of a file."""
    text = ""
    for words in steps:
        found = _printed(words, text, read)
        if found is None:
            return None
        text = found
    return text


def edited(words: Sequence[str], read: Callable[[str], str | None]) -> tuple[str, str] | None:
    """The file that `cp FROM TO` or `sed -i ... FILE` writes, with its text; None where that is not known."""
    given = [w for w in words[1:] if not w.startswith("-")]
    if words[0] == "cp" and len(given) == 2:
        text = read(given[0])
        return None if text is None else (given[1], text)
    if words[0] == "sed" and "-i" in words:
        text = _printed([w for w in words if w != "-i"], "", read)
        return None if text is None else (given[-1], text)
    return None


def _printed(words: Sequence[str], text: str, read: Callable[[str], str | None]) -> str | None:
    match words[0]:
        case "cat":
            return _joined([w for w in words[1:] if not w.startswith("-")], text, read)
        case "echo" | "printf":
            found = simple_output(words)
            return None if found is None else found + "\n"
        case "sed":
            scripts, files, options = _sed_words(words[1:])
            found = None if options - {"-e", "-E", "-r"} else _joined(files, text, read)
            for script in scripts:
                found = None if found is None else _substituted(script, found)
            return found
    return None


def _joined(files: Sequence[str], text: str, read: Callable[[str], str | None]) -> str | None:
    texts = [read(file) for file in files] if files else [text]
    return None if None in texts else "".join(t for t in texts if t is not None)


def _sed_words(words: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
    """Scripts, files and options of sed."""
    scripts = [after for word, after in zip(words, words[1:], strict=False) if word == "-e"]
    rest = [word for word, before in zip(words, ("", *words), strict=False) if before != "-e" and not word.startswith("-")]
    options = {word for word in words if word.startswith("-")}
    return (scripts, rest, options) if scripts else (rest[:1], rest[1:], options)


def _substituted(script: str, text: str) -> str | None:
    at = 0
    while at < len(script):
        found = _SUBSTITUTION.match(script, at)
        if found is None:
            return None
        old, new = _plain(found[2], found[1]), re.sub(r"\\(.)", r"\1", found[3])
        if old is None or re.search(r"(?<!\\)&|\\\d", found[3]):
            return None
        count = 0 if found[4] else 1
        text = "".join(re.sub(old, lambda _: new, line, count=count) for line in text.splitlines(keepends=True))  # noqa: B023
        at = found.end()
    return text


def _plain(pattern: str, delimiter: str) -> str | None:
    """A pattern of sed as one of Python; None if it is more than text, escaped characters and dots."""
    out = ""
    for escaped, char in re.findall(r"\\(.)|(.)", pattern, re.DOTALL):
        if escaped and not (escaped in '/.[]*^$-{}"' or escaped == delimiter) or char and char in "[]*^$":
            return None
        out += "." if char == "." else re.escape(escaped or char)
    return out or None
