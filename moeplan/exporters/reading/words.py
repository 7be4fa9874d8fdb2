"""Words of a shell script with their quotes removed and their variables filled in.

What cannot be known without running something (a variable that nothing sets, the output of a command) becomes a mark that
goes through all further text, so that it shows up by name wherever its value would be needed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from moeplan.errors import SchemaError
from moeplan.exporters.reading.arithmetic import calculate
from moeplan.exporters.reading.tokens import MARK_CLOSE, MARK_OPEN, skip_bracket, skip_quoted

_UNSET, _BLANK = "\ue001", "\ue003"
_MARK = re.compile(f"{MARK_OPEN}{_UNSET}?([^{MARK_CLOSE}]*){MARK_CLOSE}")
_UNSET_MARK = re.compile(f"{MARK_OPEN}{_UNSET}[^{MARK_CLOSE}]*{MARK_CLOSE}")
_NAME = r"[A-Za-z_]\w*"
_PARAMETER = re.compile(rf"(?P<prefix>[#!]?)(?P<name>{_NAME}|\d+|[@*#?$!-])(\[(?P<index>[^\]]*)\])?(?P<rest>.*)", re.DOTALL)
_WHOLE = re.compile(rf"(.*?)(\$@|\$\{{(?:@|{_NAME}\[@\])(?::\d+(?::\d+)?)?\}})(.*)", re.DOTALL)
_LONGEST = 1_000_000
_MOST_ITEMS = 20_000


def mark(name: str, *, unset: bool = False) -> str:
    """The mark of what is not known; `unset`: a variable that the script does not set."""
    return f"{MARK_OPEN}{_UNSET if unset else ''}{name.replace(' ', _BLANK)}{MARK_CLOSE}"


def unknowns(text: str) -> list[str]:
    """Names of what is not known in a text."""
    return list(dict.fromkeys(name.replace(_BLANK, " ") for name in _MARK.findall(text)))


def shown(text: str) -> str:
    """A text with marks as a shell would spell them."""
    return _MARK.sub(lambda m: m[1] if m[1].startswith("$") else f"${{{m[1]}}}", text).replace(_BLANK, " ")


def settled(text: str) -> str | None:
    """A text with unset variables as empty, as a shell has them; None if something else in it is not known."""
    text = _UNSET_MARK.sub("", text)
    return None if _MARK.search(text) else text


def is_unset(word: str) -> bool:
    """Whether a word is nothing but variables that nothing sets."""
    return bool(word) and not _UNSET_MARK.sub("", word)


@dataclass(slots=True)
class Variables:
    """Variables of a shell, with what was asked for and is not set."""

    values: dict[str, str | list[str]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    """Names that the user has set, which assignments leave alone."""
    exported: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)
    script: str = "script"
    """Path of the script, `$0`."""

    def text(self, name: str) -> str | None:
        """The value of a variable, of an array its first item; None where it is not set."""
        if name.isdigit():
            place = int(name)
            if place == 0:
                return self.script
            return self.positional[place - 1] if place <= len(self.positional) else None
        if name == "#":
            return str(len(self.positional))
        if name in ("?", "$", "!", "-"):
            return "0" if name == "?" else mark(f"${name}")
        value = self.values.get(name)
        if isinstance(value, list):
            return value[0] if value else None
        return value

    def items(self, name: str) -> list[str] | None:
        """The items of an array, of a plain variable its value; None where it is not set."""
        if name in ("@", "*"):
            return self.positional
        value = self.values.get(name)
        return value if isinstance(value, list) or value is None else [value]

    def assign(self, name: str, value: str | list[str], *, more: bool = False) -> None:
        """Set a variable, or with `more` append to it."""
        if name in self.fixed:
            return
        if isinstance(value, str):  # a text that grows by itself starts empty
            value = value.replace(mark(name, unset=True), "")
        old = self.values.get(name)
        if more and isinstance(value, list):
            value = [*(self.items(name) or []), *value]
        elif more and isinstance(value, str):
            if isinstance(old, list):
                value = [old[0] + value, *old[1:]] if old else [value]
            else:
                value = (old or "") + value
        size = len(value) if isinstance(value, str) else sum(map(len, value))
        if size > _LONGEST or (isinstance(value, list) and len(value) > _MOST_ITEMS):
            raise SchemaError(f"variable {name} grows beyond {_LONGEST} characters")
        self.values[name] = value


class Expander:
    """Fills in words; `substitute` gives the output of a command, or a mark."""

    def __init__(self, variables: Variables, substitute: Callable[[str], str]) -> None:
        self.variables, self._substitute = variables, substitute
        self._fields: list[str] = []
        self._open = False

    def fields(self, word: str) -> list[str]:
        """The words that one word of a command becomes: none, one or several."""
        outer = self._fields, self._open
        self._fields, self._open = [], False
        self._word(word)
        found, (self._fields, self._open) = self._fields, outer
        return found

    def text(self, word: str) -> str:
        """A word where no splitting takes place: an assignment, the subject of `case`."""
        return " ".join(self._unsplit(word))

    def quoted(self, text: str) -> str:
        """The text between double quotes, or of a here document."""
        out, at = "", 0
        while at < len(text):
            char = text[at]
            if char == "\\" and at + 1 < len(text):
                following = text[at + 1]
                out += "" if following == "\n" else following if following in '$`"\\' else char + following
                at += 2
            elif char in "$`":
                value, at = self._expansion(text, at)
                out += " ".join(value)
            else:
                end = skip_quoted(text, at) if char == MARK_OPEN else at + 1
                out, at = out + text[at:end], end
        return out

    def arithmetic(self, text: str) -> str:
        """The value of an arithmetic expression, or the mark of what is not known in it."""
        filled = self.quoted(text)
        for name in re.findall(rf"(?<![\w{MARK_OPEN}{_UNSET}]){_NAME}", _MARK.sub("", filled)):
            value = self.variables.text(name)
            filled = re.sub(rf"\b{name}\b", lambda m, v=value, n=name: f"({v})" if v else mark(n, unset=True), filled)  # type: ignore[misc]
        if found := unknowns(filled):
            return mark(found[0], unset=bool(_UNSET_MARK.search(filled)))
        number = calculate(filled)
        return mark(f"$(({text.strip()}))") if number is None else str(number)

    # One word, piece by piece.

    def _unsplit(self, word: str) -> list[str]:
        outer = self._fields, self._open
        self._fields, self._open = [], False
        self._word(word, split=False)
        found, (self._fields, self._open) = self._fields, outer
        return found

    def _add(self, text: str) -> None:
        if not self._open:
            self._fields.append("")
            self._open = True
        self._fields[-1] += text

    def _add_split(self, value: list[str]) -> None:
        for i, item in enumerate(value):
            pieces = item.split()
            if i or not item or item[0].isspace():
                self._open = False
            for k, piece in enumerate(pieces):
                self._open &= k == 0
                self._add(piece)
            if item and item[-1].isspace():
                self._open = False

    def _word(self, word: str, *, split: bool = True) -> None:
        at = 0
        while at < len(word):
            char, end = word[at], skip_quoted(word, at)
            if char == "'":
                self._add(word[at + 1 : end - 1])
            elif char == '"':
                self._double(word[at + 1 : end - 1])
            elif word.startswith("$'", at):
                self._add(word[at + 2 : end - 1].encode().decode("unicode_escape", "replace"))
            elif char == "\\":
                self._add(word[at + 1 : at + 2].replace("\n", ""))
            elif char in "$`":
                value, end = self._expansion(word, at)
                if split:
                    self._add_split(value)
                else:
                    self._add(" ".join(value))
            else:
                self._add(word[at:end])
            at = end

    def _double(self, text: str) -> None:
        """Between double quotes only "$@" and "${ARRAY[@]}" become several words."""
        whole = _WHOLE.fullmatch(text)
        items = None if whole is None else self._parameter(whole[2].strip("${}"))
        if whole is None or items is None or (len(items) == 1 and _UNSET_MARK.fullmatch(items[0])):
            self._add(self.quoted(text))
            return
        if whole[1]:
            self._add(self.quoted(whole[1]))
        for i, item in enumerate(items):
            self._open &= i == 0
            self._add(item)
        if whole[3]:
            self._double(whole[3])

    def _expansion(self, text: str, at: int) -> tuple[list[str], int]:
        """The value of what starts at `at` with "$" or a backquote, and the place behind it."""
        if text[at] == "`":
            end = skip_quoted(text, at)
            return [self._substitute(text[at + 1 : end - 1])], end
        following = text[at + 1 : at + 2]
        if text.startswith("$((", at) and text[skip_bracket(text, at + 1) - 2 :].startswith("))"):
            end = skip_bracket(text, at + 1)
            return [self.arithmetic(text[at + 3 : end - 2])], end
        if following in ("(", "{", "["):
            end = skip_bracket(text, at + 1)
            inside = text[at + 2 : end - 1]
            if following == "(":
                return [self._substitute(inside)], end
            return ([self.arithmetic(inside)] if following == "[" else self._parameter(inside)), end
        name = re.compile(rf"{_NAME}|\d|[@*#?$!-]").match(text, at + 1)
        if name is None:
            return ["$"], at + 1
        return self._parameter(name[0]), name.end()

    def _parameter(self, text: str) -> list[str]:
        """The value of `${text}`."""
        match = _PARAMETER.fullmatch(text)
        if match is None:
            return [mark(f"${{{text}}}")]
        prefix, name, index, rest = match["prefix"], match["name"], match["index"], match["rest"]
        if prefix == "!" and not index:
            name = self.variables.text(name) or name
        whole = index in ("@", "*") or name in ("@", "*")
        if prefix == "!" and whole:
            return [str(i) for i in range(len(self.variables.items(name) or []))]
        value = self.variables.items(name) if whole else self._single(name, index)
        if prefix == "#":
            return [str(len(value or []) if whole else len((value or [""])[0]))]
        operation = re.match(r":?[-=+?]", rest)
        if operation:
            return self._default(name, value, operation[0], rest[operation.end() :])
        if value is None:
            return [mark(name, unset=True)] if not name.startswith(("@", "*")) else []
        if whole and (part := re.fullmatch(r":\s*(\d+)(?::\s*(\d+))?", rest)):
            start = max(0, int(part[1]) - (name in ("@", "*")))  # arguments are counted from 1
            return value[start : start + int(part[2]) if part[2] else None]
        return [self._changed(item, rest) for item in value] if rest else value

    def _single(self, name: str, index: str | None) -> list[str] | None:
        if not index:
            value = self.variables.text(name)
            return None if value is None else [value]
        place = self.arithmetic(index)
        items = self.variables.items(name)
        if items is None or not re.fullmatch(r"-?\d+", place) or not -len(items) <= int(place) < len(items):
            return None if items is None else [mark(f"{name}[{shown(index)}]")]
        return [items[int(place)]]

    def _default(self, name: str, value: list[str] | None, operation: str, word: str) -> list[str]:
        given = value is not None and (":" not in operation or any(settled(v) != "" for v in value))
        if operation.endswith("+"):
            return self._unsplit(word) if given else [""]
        if given or operation.endswith("?"):
            return value if given and value is not None else [mark(name, unset=True)]
        chosen = self._unsplit(word)
        if operation.endswith("="):
            self.variables.assign(name, " ".join(chosen))
        return chosen or [""]

    def _changed(self, value: str, rest: str) -> str:
        """Prefixes, suffixes, replacements, parts and letter case."""
        if unknowns(value):
            return value
        if rest in ("^^", ",,", "^", ","):
            head, tail = (value, "") if len(rest) == 2 else (value[:1], value[1:])
            return (head.upper() if rest[0] == "^" else head.lower()) + tail
        if rest[0] in "#%":
            return _trimmed(value, rest[0], len(rest) > 1 and rest[1] == rest[0], self.text(rest.lstrip(rest[0])))
        if replace := re.fullmatch(r"/(/?)([^/]+)/?(.*)", rest, re.DOTALL):
            count = 0 if replace[1] else 1
            pattern = fnmatch.translate(self.text(replace[2])).removesuffix(r"\Z").removesuffix(r"\z")
            by = self.text(replace[3])
            return re.sub(pattern, lambda _: by, value, count=count)
        if part := re.fullmatch(r":\s*(-?\d+)(?::\s*(\d+))?", rest):
            start = int(part[1]) if int(part[1]) >= 0 else max(0, len(value) + int(part[1]))
            return value[start : start + int(part[2]) if part[2] else None]
        return mark(f"${{...{rest}}}")


def _trimmed(value: str, side: str, longest: bool, pattern: str) -> str:
    """A value without the shortest or longest prefix ("#") or suffix ("%") of a pattern."""
    cuts = range(len(value) + 1)
    for cut in cuts if longest == (side == "%") else reversed(cuts):
        part = value[:cut] if side == "#" else value[cut:]
        if fnmatch.fnmatchcase(part, pattern):
            return value[cut:] if side == "#" else value[:cut]
    return value
