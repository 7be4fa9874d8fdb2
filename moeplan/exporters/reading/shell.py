"""What a launch script would start, worked out without running anything.

Variables, arrays, conditions, loops and functions are followed; files beside the script that it sources or starts are read;
strings that it hands to another shell, and here documents, are scripts of their own. Commands are not run: what one would
print is not known, and what one would answer counts as success.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeplan.errors import SchemaError
from moeplan.exporters.reading import script
from moeplan.exporters.reading.conditions import holds
from moeplan.exporters.reading.pipes import edited, piped
from moeplan.exporters.reading.substitution import printed
from moeplan.exporters.reading.tokens import Word
from moeplan.exporters.reading.words import Expander, Variables, settled, shown, unknowns

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\[[^\]]*\])?(\+?)=(.*)", re.DOTALL)
_DECLARING = ("export", "declare", "local", "readonly", "typeset")
_REMOTE = ("ssh", "pdsh", "clush", "parallel-ssh", "pssh")
"""Programs that hand a script, as one word, to the shells of other machines."""
_SHELLS = ("bash", "sh", "zsh", "dash", "ksh")
_SILENT = ("echo", "printf", "set", "cd", "mkdir", "cat", "ulimit", "module", "wait", "trap", "sleep", "shopt", "tee", "rm")
_MOST_STEPS, _MOST_ROUNDS, _DEEPEST, _MOST_BYTES = 100_000, 1000, 12, 5_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A program that a script starts."""

    words: tuple[str, ...]
    """The program with its arguments; what is not known is marked."""
    before: tuple[str, ...]
    """Words of what starts it: `srun`, `mpirun`, `docker run`."""
    environment: Mapping[str, str]
    """Variables that it gets from the script."""
    line: int


class _Leave(Exception):
    """The script, or a function of it, ends here."""


@dataclass(slots=True)
class Shell:
    """Follows scripts; `started` and `remarks` are what it found."""

    where: str
    folder: Path | None
    """Folder of the script, where it looks for further files."""
    variables: Variables
    started: list[Started] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    functions: dict[str, script.Block] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Files that the script writes with here documents."""
    before: tuple[str, ...] = ()
    depth: int = 0
    steps: int = 0

    def read(self, text: str, first_line: int = 1) -> None:
        """Follow a script."""
        if self.depth > _DEEPEST:
            raise SchemaError(f"{self.where}: scripts start each other more than {_DEEPEST} deep")
        self.depth += 1
        try:
            self._block(script.parse(text, self.where, first_line))
        except _Leave:
            pass
        finally:
            self.depth -= 1

    @property
    def _expander(self) -> Expander:
        return Expander(self.variables, lambda text: printed(text, self.where, self._expander.fields))

    def _remark(self, line: int, text: str) -> None:
        found = f"line {line}: {text}"
        if found not in self.remarks:
            self.remarks.append(found)

    # The tree. Outcomes are those of commands: success, failure, not known.

    def _block(self, block: script.Block) -> bool | None:
        outcome: bool | None = True
        for node in block:
            outcome = self._node(node)
        return outcome

    def _node(self, node: script.Node) -> bool | None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise SchemaError(f"{self.where}: more than {_MOST_STEPS} commands", hint="does it loop without end?")
        match node:
            case script.Command():
                return self._command(node)
            case script.Chain():
                return self._chain(node)
            case script.Branches():
                return self._branches(node)
            case script.Case():
                return self._case(node)
            case script.Each():
                return self._each(node)
            case script.Loop():
                return self._loop(node)
            case script.Function():
                self.functions[node.name] = node.body
            case script.Group():
                return self._block(node.body)
        return True

    def _chain(self, node: script.Chain) -> bool | None:
        if {operator for operator, _ in node.rest} == {"|"} and self._writes([node.first, *(n for _, n in node.rest)]):
            return True
        outcome = self._node(node.first)
        if node.negated and outcome is not None:
            outcome = not outcome
        for operator, following in node.rest:
            if operator == "|":
                outcome = self._node(following)
            elif operator == "&&" and outcome is not False or operator == "||" and outcome is False:
                outcome = self._node(following)
        return outcome

    def _branches(self, node: script.Branches) -> bool | None:
        for condition, body in node.branches:
            outcome = self._block(condition) if condition else True
            if outcome is None:
                self._remark(node.line, "this condition is not known here and is taken as false")
            if outcome:
                return self._block(body)
        return True

    def _case(self, node: script.Case) -> bool | None:
        subject = self._expander.text(node.subject.text)
        known = settled(subject)
        if known is None or unknowns(subject):
            self._remark(node.line, f"'case {shown(subject)}' is not known here and is taken as empty")
        for patterns, body in node.branches:
            if any(fnmatch.fnmatchcase(known or "", self._expander.text(p.text)) for p in patterns):
                return self._block(body)
        return True

    def _each(self, node: script.Each) -> bool | None:
        if node.words is None:
            self._remark(node.line, "this loop is passed over")
            return True
        for value in [f for word in node.words for f in self._expander.fields(word.text)][:_MOST_ROUNDS]:
            self.variables.assign(node.name, value)
            self._block(node.body)
        return True

    def _loop(self, node: script.Loop) -> bool | None:
        for _ in range(_MOST_ROUNDS):
            outcome = self._block(node.condition)
            if outcome is None:
                self._remark(node.line, "this loop is passed over")
            if outcome is None or outcome == node.until:
                return True
            self._block(node.body)
        return True

    # Commands.

    def _command(self, node: script.Command) -> bool | None:
        words = list(node.words)
        own: dict[str, str] = {}
        while words and (match := _ASSIGNMENT.fullmatch(words[0].text)):
            if len(words) > 1 and words[0].items is None:
                own[match[1]] = self._expander.text(match[4])
            self._assign(words.pop(0), match)
        if not words:
            return True
        if self._writes([node]):
            return True
        name = words[0].text
        if name in ("[", "[[", "test"):
            inside = words[1:] if name == "test" else words[1:-1]
            return holds([self._expander.text(w.text) for w in inside])
        if name == "((":
            value = settled(self._expander.arithmetic(words[1].text))
            return None if value is None else value not in ("", "0")
        if name in _DECLARING:
            return self._declare(name, words[1:])
        fields = [f for word in words for f in self._expander.fields(word.text)]
        return self._run(fields, node, own) if fields else True

    def _assign(self, word: Word, match: re.Match[str]) -> None:
        name, index, more = match[1], match[2], bool(match[3])
        if word.items is not None:
            items = [f for item in word.items for f in self._expander.fields(item.text)]
            self.variables.assign(name, items, more=more)
            return
        value = self._expander.text(match[4])
        if index:
            items = list(self.variables.items(name) or [])
            place = self._expander.arithmetic(index[1:-1])
            if place.isdigit() and int(place) <= len(items):
                items[int(place) : int(place) + 1] = [value]
                self.variables.assign(name, items)
            return
        self.variables.assign(name, value, more=more)

    def _declare(self, name: str, words: Sequence[Word]) -> bool:
        for word in words:
            match = _ASSIGNMENT.fullmatch(word.text)
            if match:
                self._assign(word, match)
            if name == "export" and (match or re.fullmatch(r"\w+", word.text)):
                self.variables.exported.add(match[1] if match else word.text)
        return True

    def _run(self, words: list[str], node: script.Command, own: Mapping[str, str]) -> bool | None:
        name, line = words[0].rsplit("/", 1)[-1], node.line
        documents = [d.text if d.quoted else self._expander.quoted(d.text) for d in node.heredocs]
        documents += [self._expander.text(w.text) + "\n" for w in node.strings]
        if name in self.functions:
            return self._call(name, words[1:])
        match name:
            case "true" | ":" | "false":
                return name != "false"
            case "shift":
                count = int(words[1]) if len(words) > 1 and words[1].isdigit() else 1
                self.variables.positional = self.variables.positional[count:]
                return True
            case "unset":
                for gone in words[1:]:
                    self.variables.values.pop(gone, None)
                return True
            case "exit" | "return":
                if name == "return" or self.started:
                    raise _Leave
                self._remark(line, "'exit' is passed over")
                return True
            case "source" | ".":
                return self._file(words[1:], line, here=True)
            case "eval":
                self._block(script.parse(" ".join(words[1:]), self.where, line))
                return True
            case "read":
                target = words[-1]
                if documents and re.fullmatch(r"[A-Za-z_]\w*", target):
                    self.variables.assign(target, documents[0].strip("\n"))
                return True
        if documents and (name in ("cat", "tee")):
            targets = [self._expander.text(w.text) for w in node.outputs] + (words[1:] if name == "tee" else [])
            self.files |= {Path(target).name: documents[0] for target in targets}
            return True
        return None if name in _SILENT else self._start(words, documents, own, line)

    def _writes(self, nodes: Sequence[script.Node]) -> bool:
        """Whether a pipeline of cat, echo and sed writes a file, whose text is then noted."""
        commands = [n for n in nodes if isinstance(n, script.Command) and n.words and not n.heredocs and not n.strings]
        if len(commands) < len(nodes) or commands[-1].words[0].text not in ("cat", "echo", "printf", "sed", "cp"):
            return False
        steps = [[f for word in c.words for f in self._expander.fields(word.text)] for c in commands]
        targets = [self._expander.text(word.text) for word in commands[-1].outputs]
        if not targets and len(steps) == 1 and (found := edited(steps[0], self._text_of)) is not None:
            self.files[Path(found[0]).name] = found[1]
            return True
        text = piped(steps, self._text_of) if targets and all(steps) else None
        if text is not None:
            self.files |= {Path(target).name: text for target in targets}
        return text is not None

    def _text_of(self, name: str) -> str | None:
        """The text of a file that the script has written or that lies beside it; None if it cannot be seen."""
        text = self.files.get(Path(name).name)
        if text is None and self.folder is not None and not unknowns(name):
            path = self.folder / name
            try:
                if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                    text = path.read_text(encoding="utf-8")
            except (OSError, ValueError):
                pass
        return text

    def _call(self, name: str, arguments: list[str]) -> bool | None:
        if self.depth > _DEEPEST:
            raise SchemaError(f"{self.where}: function {name} calls itself more than {_DEEPEST} deep")
        outer, self.variables.positional = self.variables.positional, arguments
        self.depth += 1
        try:
            return self._block(self.functions[name])
        except _Leave:
            return None
        finally:
            self.variables.positional = outer
            self.depth -= 1

    def _child(self, text: str, line: int, before: tuple[str, ...] = (), arguments: Sequence[str] = ()) -> None:
        """Follow a script that this one hands to another shell, which sees the exported variables only."""
        outer, outer_before, mine = self.variables, self.before, self.variables
        seen = {n: v for n, v in mine.values.items() if n in mine.exported or n in mine.fixed}
        self.variables = Variables(
            values=seen, fixed=mine.fixed, exported=set(mine.exported), positional=list(arguments), script=mine.script
        )
        self.before = (*self.before, *before)
        try:
            self.read(text, line)
        finally:
            self.variables, self.before = outer, outer_before

    def _file(self, words: Sequence[str], line: int, before: tuple[str, ...] = (), *, here: bool = False) -> bool | None:
        """Follow another file, if it can be seen; `here`: in this shell, as `source` does."""
        name = words[0] if words else ""
        text = self._text_of(name)
        if text is None:
            self._remark(line, f"'{shown(name)}' cannot be read here and is passed over")
            return None
        where, self.where = self.where, f"'{shown(name)}'"
        try:
            if here:
                self.read(text)
            else:
                self._child(text, 1, before, words[1:])
        finally:
            self.where = where
        return None

    def _start(self, words: list[str], documents: Sequence[str], own: Mapping[str, str], line: int) -> bool | None:
        """A program: another shell with a script of its own, or what is recorded as started."""
        for i, word in enumerate(words):
            base = word.rsplit("/", 1)[-1]
            if base in _SHELLS:
                return self._other_shell(words[i + 1 :], documents, line, tuple(words[:i]))
            if is_program(base):
                break
            if i and base in self.files or base.endswith((".sh", ".sbatch", ".slurm")) and (i == 0 or "=" not in word):
                return self._file(words[i:], line, tuple(words[:i]))
        else:
            elsewhere = [word for word in words if " " in word] if words[0].rsplit("/", 1)[-1] in _REMOTE else []
            for text in (*documents, *elsewhere):
                self._child(text, line, tuple(words))
            return None
        values = self.variables.values
        exported = {n: v for n in self.variables.exported if isinstance(v := values.get(n), str)}
        self.started.append(
            Started(
                words=tuple(words[i:]),
                before=(*self.before, *words[:i]),
                environment={
                    **exported,
                    **dict(word.split("=", 1) for word in words[:i] if _ASSIGNMENT.fullmatch(word)),
                    **own,
                },
                line=line,
            )
        )
        return None

    def _other_shell(self, words: Sequence[str], documents: Sequence[str], line: int, before: tuple[str, ...]) -> bool | None:
        for i, word in enumerate(words):
            if re.fullmatch(r"-[a-z]*c[a-z]*", word) and i + 1 < len(words):
                self._child(words[i + 1], line, before, words[i + 3 :])
                return None
            if not word.startswith(("-", "+")):
                return self._file(words[i:], line, before)
        for document in documents:
            self._child(document, line, before)
        return None


def is_program(base: str) -> bool:
    """Whether a program is one that starts a training run."""
    return base in ("torchrun", "deepspeed", "accelerate") or re.fullmatch(r"python[\d.]*", base) is not None


def shell_of(where: str, path: Path | None, settings: Mapping[str, str], positional: Sequence[str]) -> Shell:
    """A shell at the start of a script; `settings` are variables that the user has set."""
    variables = Variables(
        values=dict(settings),
        fixed=frozenset(settings),
        exported=set(settings),
        positional=list(positional),
        script=path.name if path is not None else "script",
    )
    return Shell(where=where, folder=path.parent if path is not None else None, variables=variables)
