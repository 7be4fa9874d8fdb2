"""Tokens of a shell script: words as they stand, operators, here documents.

Quotes, expansions and brackets stay in the words; a word ends at a blank or an operator outside of them. A backslash before
a new line joins lines, "#" at the start of a word begins a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moeplan.errors import SchemaError

_BLANK, _META = " \t\r", " \t\r\n;&|<>()"
_OPERATORS = ("&>>", "<<<", "<<-", ";;&", "&&", "||", ";;", ";&", "<<", ">>", "&>", ">&", "<&", "<>", ">|", "|&")
MARK_OPEN, MARK_CLOSE = "\ue000", "\ue002"
"""What stands around the name of something that is not known, in words that were filled in already."""
_ARRAY = re.compile(r"[A-Za-z_]\w*(\[[^\]]*\])?\+?=")


@dataclass(frozen=True, slots=True)
class Word:
    """One word as it stands in the script."""

    text: str
    line: int
    items: tuple[Word, ...] | None = None
    """Words between the brackets of an array assignment, whose `text` is "NAME=" or "NAME+="."""


@dataclass(slots=True)
class Heredoc:
    """A here document."""

    end: str
    line: int
    quoted: bool
    """Nothing in it is expanded."""
    dashed: bool
    text: str = ""


@dataclass(slots=True)
class Token:
    """What the lexer stands at."""

    kind: str
    """"word", "operator", "newline" or "end"."""
    text: str
    line: int
    start: int
    word: Word | None = None


@dataclass(slots=True)
class Lexer:
    """Reads a script token by token; `token` is the one it stands at."""

    text: str
    where: str
    line: int
    at: int = 0
    token: Token = field(default_factory=lambda: Token("newline", "", 0, 0))
    waiting: list[Heredoc] = field(default_factory=list)
    """Here documents whose text begins on the next line."""

    def fault(self, problem: str, line: int = 0) -> SchemaError:
        """An error at a line, by default that of the token."""
        return SchemaError(f"{self.where}, line {line or self.token.line}: {problem}", hint="does `bash -n` accept it?")

    def advance(self) -> None:
        """Go on to the next token."""
        text = self.text
        while self.at < len(text):
            if text[self.at] in _BLANK:
                self.at += 1
            elif text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
            elif text[self.at] == "#":
                end = text.find("\n", self.at)
                self.at = end if end >= 0 else len(text)
            else:
                break
        start = self.at
        if start >= len(text):
            self.token = Token("end", "the end of the script", self.line, start)
        elif text[start] == "\n":
            self.token = Token("newline", "a new line", self.line, start)
            self.at, self.line = start + 1, self.line + 1
            self._read_heredocs()
        elif text[start] in _META and not text.startswith(("<(", ">("), start):
            operator = next((o for o in _OPERATORS if text.startswith(o, start)), text[start])
            self.at = start + len(operator)
            self.token = Token("operator", operator, self.line, start)
        else:
            word = self._read_word()
            if word.text.isdigit() and self.at < len(text) and text[self.at] in "<>":  # the number of a stream
                self.advance()
            else:
                self.token = Token("word", word.text, word.line, start, word)

    def _read_word(self) -> Word:
        text, line, out = self.text, self.line, ""
        while self.at < len(text):
            char = text[self.at]
            if char == "(" and _ARRAY.fullmatch(out):
                return Word(out, line, self._read_array())
            if char in _META:
                if not text.startswith(("<(", ">("), self.at) or out:
                    break
                end = skip_bracket(text, self.at + 1)
            elif text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
                continue
            else:
                end = skip_quoted(text, self.at)
            if end > len(text):
                raise self.fault(f"the {char} that starts here does not end", self.line)
            self.line += text.count("\n", self.at, end)
            out += text[self.at : end]
            self.at = end
        return Word(out, line)

    def _read_array(self) -> tuple[Word, ...]:
        line = self.line
        self.at += 1
        items = []
        while True:
            self.advance()
            if self.token.kind == "word" and self.token.word is not None:
                items.append(self.token.word)
            elif self.token.kind == "operator" and self.token.text == ")":
                return tuple(items)
            elif self.token.kind != "newline":
                raise self.fault(f"the array does not end before {self.token.text}", line)

    def _read_heredocs(self) -> None:
        for heredoc in self.waiting:
            lines = []
            heredoc.line = self.line
            while self.at < len(self.text):
                end = self.text.find("\n", self.at)
                end = end if end >= 0 else len(self.text)
                row = self.text[self.at : end]
                self.at, self.line = min(end + 1, len(self.text)), self.line + 1
                row = row.lstrip("\t") if heredoc.dashed else row
                if row == heredoc.end:
                    break
                lines.append(row)
            heredoc.text = "\n".join(lines) + "\n"
        self.waiting.clear()


def skip_quoted(text: str, at: int) -> int:
    """The place behind the quotes, `$(...)`, `${...}` or backquotes that start at `at`; else behind one character."""
    char = text[at]
    if char == "\\":
        return at + 2
    if char == MARK_OPEN:
        return text.find(MARK_CLOSE, at) + 1 or at + 1
    if char == "'":
        end = text.find("'", at + 1)
        return end + 1 if end >= 0 else len(text) + 1
    if char == '"' or char == "`":
        at += 1
        while at < len(text) and text[at] != char:
            at = skip_quoted(text, at) if text[at] in ("\\", "$", "`") else at + 1
        return at + 1
    if char == "$" and text[at + 1 : at + 2] == "'":
        at += 2
        while at < len(text) and text[at] != "'":
            at += 2 if text[at] == "\\" else 1
        return at + 1
    if char == "$" and text[at + 1 : at + 2] in ("(", "{", "["):
        return skip_bracket(text, at + 1)
    return at + 1


def skip_bracket(text: str, at: int) -> int:
    """The place behind the bracket that closes the one at `at`."""
    opening = text[at]
    closing = {"(": ")", "{": "}", "[": "]"}[opening]
    at += 1
    while at < len(text) and text[at] != closing:
        at = skip_bracket(text, at) if text[at] == opening else skip_quoted(text, at)
    return at + 1
