"""Text of a shell script to a tree of commands; nothing is expanded or run.

The syntax is that part of bash which launch scripts use: simple commands with assignments, arrays, redirections and here
documents, lists, pipelines, `if`, `case`, `for`, `while`, functions, groups, `[[ ]]` and `(( ))`. Words stay as written, quotes
and all; `words.py` expands them. What is not understood is an error with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from moeplan.exporters.reading.tokens import Heredoc, Lexer, Word, skip_bracket

_REDIRECTIONS = frozenset(("<", ">", ">>", "<<", "<<-", "<<<", "&>", "&>>", ">&", "<&", "<>", ">|"))
_DEEPEST = 60


@dataclass(frozen=True, slots=True)
class Command:
    """Assignments and words, with what is redirected."""

    words: tuple[Word, ...]
    line: int
    heredocs: tuple[Heredoc, ...] = ()
    strings: tuple[Word, ...] = ()
    """Here strings (`<<<`)."""
    outputs: tuple[Word, ...] = ()
    """Files that it writes."""


@dataclass(frozen=True, slots=True)
class Branches:
    """`if`: conditions with their bodies in order, the last condition is empty for `else`."""

    branches: tuple[tuple[Block, Block], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Loop:
    """`while` or `until`."""

    condition: Block
    body: Block
    until: bool
    line: int


@dataclass(frozen=True, slots=True)
class Each:
    """`for NAME in words`; the words are those of "$@" where none are given, and None in the form of `for ((;;))`."""

    name: str
    words: tuple[Word, ...] | None
    body: Block
    line: int


@dataclass(frozen=True, slots=True)
class Case:
    """`case`."""

    subject: Word
    branches: tuple[tuple[tuple[Word, ...], Block], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Function:
    """A function's definition."""

    name: str
    body: Block
    line: int


@dataclass(frozen=True, slots=True)
class Group:
    """Commands in braces or brackets."""

    body: Block
    line: int
    heredocs: tuple[Heredoc, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """Commands joined by "&&", "||" or "|", taken from the left; "!" before the first turns its outcome around."""

    first: Node
    rest: tuple[tuple[str, Node], ...] = ()
    negated: bool = False


Node: TypeAlias = Command | Branches | Loop | Each | Case | Function | Group | Chain
Block: TypeAlias = tuple[Node, ...]


def parse(text: str, where: str, first_line: int = 1) -> Block:
    """The commands of a script; `where` names it in errors."""
    lexer = Lexer(text.replace("\r\n", "\n"), where, first_line)
    try:
        return _Parser(lexer).script()
    except RecursionError:
        raise lexer.fault("nested too deeply") from None


@dataclass(slots=True)
class _Parser:
    lex: Lexer
    depth: int = 0

    def script(self) -> Block:
        self.lex.advance()
        block = self.block(())
        if self.lex.token.kind != "end":
            raise self.lex.fault(f"'{self.lex.token.text}' is not expected here")
        return block

    def word_is(self, *names: str) -> bool:
        return self.lex.token.kind == "word" and self.lex.token.text in names

    def operator_is(self, *names: str) -> bool:
        return self.lex.token.kind == "operator" and self.lex.token.text in names

    def expect(self, name: str, line: int) -> None:
        if not (self.word_is(name) or self.operator_is(name)):
            raise self.lex.fault(f"'{name}' is missing before {self.lex.token.text}", line)
        self.lex.advance()

    def skip_lines(self) -> None:
        while self.lex.token.kind == "newline":
            self.lex.advance()

    def block(self, ends: tuple[str, ...]) -> Block:
        """Commands up to one of the words or operators in `ends`, which stays."""
        nodes: list[Node] = []
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.lex.fault("nested too deeply")
        while True:
            while self.lex.token.kind == "newline" or self.operator_is(";", "&"):
                self.lex.advance()
            if self.lex.token.kind == "end" or self.word_is(*ends) or self.operator_is(*ends):
                self.depth -= 1
                return tuple(nodes)
            nodes.append(self.chain())

    def chain(self) -> Node:
        negated = False
        while self.word_is("!", "time"):
            negated ^= self.lex.token.text == "!"
            self.lex.advance()
        first, rest = self.command(), []
        while self.operator_is("&&", "||", "|", "|&"):
            operator = self.lex.token.text[:2].replace("|&", "|")
            self.lex.advance()
            self.skip_lines()
            rest.append((operator, self.command()))
        return Chain(first, tuple(rest), negated) if rest or negated else first

    def command(self) -> Node:
        line = self.lex.token.line
        if self.operator_is("("):
            if self.lex.text.startswith("(", self.lex.at):
                return self.arithmetic(line)
            self.lex.advance()
            body = self.block((")",))
            self.expect(")", line)
            return Group(body, line, self.redirections()[0])
        if self.lex.token.kind != "word":
            raise self.lex.fault(f"'{self.lex.token.text}' is not expected here")
        match self.lex.token.text:
            case "if":
                return self.branches(line)
            case "while" | "until":
                until = self.lex.token.text == "until"
                self.lex.advance()
                condition = self.block(("do",))
                return Loop(condition, self.body(line), until, line)
            case "for" | "select":
                return self.each(line)
            case "case":
                return self.case(line)
            case "{":
                self.lex.advance()
                body = self.block(("}",))
                self.expect("}", line)
                return Group(body, line, self.redirections()[0])
            case "function":
                self.lex.advance()
                name = self.lex.token.text
                self.lex.advance()
                if self.operator_is("("):
                    self.lex.advance()
                    self.expect(")", line)
                return self.function(name, line)
        return self.simple(line)

    def arithmetic(self, line: int) -> Node:
        end = skip_bracket(self.lex.text, self.lex.at - 1)
        if end > len(self.lex.text):
            raise self.lex.fault("'((' does not end", line)
        words = (Word("((", line), Word(self.lex.text[self.lex.at + 1 : end - 2], line))
        self.lex.line += self.lex.text.count("\n", self.lex.at, end)
        self.lex.at = end
        self.lex.advance()
        return Command(words, line)

    def body(self, line: int) -> Block:
        self.expect("do", line)
        body = self.block(("done",))
        self.expect("done", line)
        self.redirections()
        return body

    def branches(self, line: int) -> Node:
        out: list[tuple[Block, Block]] = []
        while self.word_is("if", "elif"):
            self.lex.advance()
            condition = self.block(("then",))
            self.expect("then", line)
            out.append((condition, self.block(("elif", "else", "fi"))))
        if self.word_is("else"):
            self.lex.advance()
            out.append(((), self.block(("fi",))))
        self.expect("fi", line)
        self.redirections()
        return Branches(tuple(out), line)

    def each(self, line: int) -> Node:
        self.lex.advance()
        if self.operator_is("("):
            end = skip_bracket(self.lex.text, self.lex.at - 1)
            self.lex.at = end
            self.lex.advance()
            while self.operator_is(";") or self.lex.token.kind == "newline":
                self.lex.advance()
            return Each("", None, self.body(line), line)
        name = self.lex.token.text
        self.lex.advance()
        self.skip_lines()
        words: list[Word] = [Word('"$@"', line)]
        if self.word_is("in"):
            self.lex.advance()
            words = []
            while self.lex.token.kind == "word" and self.lex.token.word is not None:
                words.append(self.lex.token.word)
                self.lex.advance()
        while self.operator_is(";") or self.lex.token.kind == "newline":
            self.lex.advance()
        return Each(name, tuple(words), self.body(line), line)

    def case(self, line: int) -> Node:
        self.lex.advance()
        if self.lex.token.word is None:
            raise self.lex.fault("a word is missing behind 'case'")
        subject = self.lex.token.word
        self.lex.advance()
        self.skip_lines()
        self.expect("in", line)
        branches: list[tuple[tuple[Word, ...], Block]] = []
        while True:
            self.skip_lines()
            if self.word_is("esac"):
                self.lex.advance()
                self.redirections()
                return Case(subject, tuple(branches), line)
            patterns: list[Word] = []
            while not self.operator_is(")"):
                if self.lex.token.word is not None:
                    patterns.append(self.lex.token.word)
                elif not self.operator_is("(", "|"):
                    raise self.lex.fault("this 'case' is not understood", line)
                self.lex.advance()
            self.lex.advance()
            branches.append((tuple(patterns), self.block((";;", ";&", ";;&", "esac"))))
            if self.operator_is(";;", ";&", ";;&"):
                self.lex.advance()

    def function(self, name: str, line: int) -> Node:
        self.skip_lines()
        body = self.command()
        return Function(name, body.body if isinstance(body, Group) else (body,), line)

    def redirections(self) -> tuple[tuple[Heredoc, ...], tuple[Word, ...], tuple[Word, ...]]:
        """Here documents, here strings and files written, at the current token."""
        heredocs, strings, outputs = [], [], []
        while self.lex.token.kind == "operator" and self.lex.token.text in _REDIRECTIONS:
            operator, line = self.lex.token.text, self.lex.token.line
            self.lex.advance()
            word = self.lex.token.word
            if word is None:
                raise self.lex.fault(f"a word is missing behind '{operator}'", line)
            if operator in ("<<", "<<-"):
                end = re.sub(r"[\"'\\]", "", word.text)
                heredocs.append(Heredoc(end, line, end != word.text, operator == "<<-"))
                self.lex.waiting.append(heredocs[-1])
            elif operator == "<<<":
                strings.append(word)
            elif operator in (">", ">>", ">|", "&>", "&>>"):
                outputs.append(word)
            self.lex.advance()
        return tuple(heredocs), tuple(strings), tuple(outputs)

    def simple(self, line: int) -> Node:
        words: list[Word] = []
        heredocs: tuple[Heredoc, ...] = ()
        strings: tuple[Word, ...] = ()
        outputs: tuple[Word, ...] = ()
        inside = self.word_is("[[")
        while True:
            if inside:
                if self.lex.token.kind == "end":
                    raise self.lex.fault("'[[' does not end", line)
                if self.lex.token.kind != "newline":
                    words.append(self.lex.token.word or Word(self.lex.token.text, self.lex.token.line))
                inside = not self.word_is("]]")
                self.lex.advance()
            elif self.lex.token.kind == "word" and self.lex.token.word is not None:
                words.append(self.lex.token.word)
                self.lex.advance()
                if len(words) == 1 and self.operator_is("(") and words[0].items is None:
                    self.lex.advance()
                    self.expect(")", line)
                    return self.function(words[0].text, line)
            elif self.lex.token.kind == "operator" and self.lex.token.text in _REDIRECTIONS:
                more = self.redirections()
                heredocs, strings, outputs = heredocs + more[0], strings + more[1], outputs + more[2]
            else:
                return Command(tuple(words), line, heredocs, strings, outputs)
