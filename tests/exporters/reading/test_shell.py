"""The shell reader against bash itself: the words of a training command are the same, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeplan.errors import SchemaError
from moeplan.exporters.reading.arithmetic import calculate
from moeplan.exporters.reading.conditions import holds
from moeplan.exporters.reading.script import parse
from moeplan.exporters.reading.shell import shell_of
from moeplan.exporters.reading.words import mark, shown, unknowns
from tests.exporters.reading.judges import recorded

SNIPPETS = {
    "quotes": """A='one $B' ; B="two  $A"; torchrun x.py $B "$B" '$B' "a\\"b" a\\ b $'tab\\tend' "" 'it'"'"'s'""",
    "defaults": """U=; torchrun x.py ${U:-1} ${U-2} ${V:-3} ${V-4} "${W:=5}" $W ${W:+set} ${V:+set} ${V+set} "${U:-"a b"}" """,
    "trimming": """P=a/b.c.d; torchrun x.py ${P##*/} ${P#*/} ${P%.*} ${P%%.*} ${P/./-} ${P//./-} ${P:2} ${P:2:3} ${P^^}""",
    "arrays": """A=(1 "2 3" '4'); A+=(5); A[1]=x
        torchrun x.py ${A[@]} "${A[@]}" "${A[*]}" ${#A[@]} ${A[2]} $A "${A[@]:1:2}" p"${A[@]}"s""",
    "numbers": """N=4; M=$((N * 2 + 1))
        torchrun x.py $M $((M / 2)) $(( (M - 1) % 3 )) $[N+1] $((N > 3 ? 10 : 20)) $((-7 / 2))""",
    "continued": "A=\"--a 1 \\\n  --b 2 # no comment\"\ntorchrun \\\n  x.py \\\n  $A \\\n  --c  # a comment\n",
    "heredoc": "G=8\nread -r -d '' T <<EOF\n--g $G \\$G\n  --h\nEOF\ntorchrun x.py $T\n",
    "string": "F='--a  1'; bash -c \"torchrun x.py $F \\\"q  q\\\"\"",
    "nested document": "A=7\nbash <<'EOF'\nB=2; torchrun x.py $B ${A:-none}\nEOF\n",
    "case": 'for m in a bb "c d"; do case "$m" in a|x) R=1;; b*) R+=2;; *) R+=" $m";; esac; done; torchrun x.py $R',
    "if": 'X=b; if [ "$X" = a ] || [[ $X == b* && ! -z $X ]]; then Y=1; elif true; then Y=2; else Y=3; fi; torchrun x.py $Y',
    "tests": '[ 3 -gt 2 ] && A=1; [[ abc =~ ^a.c$ ]] && B=1; (( 2 > 3 )) || C=1; ! false && D=1; torchrun x.py $A $B $C $D',
    "functions": 'f() { local n=$1; shift; OUT="$n-$#-$*"; return 0; OUT=no; }\n'
    'function g { f "$@" last; }; g 1 2 "3 4"; torchrun x.py "$OUT" $OUT',
    "loop": 'i=0; while [ $i -lt 3 ]; do L="$L $i"; i=$((i+1)); done\n'
    'until (( i == 0 )); do i=$((i-1)); done; torchrun x.py $L $i',
    "eval": """A="--x '1 2'"; CMD="torchrun x.py $A"; eval $CMD""",
    "pipes": "torchrun x.py --a 1 2>&1 | tee log.txt &\nwait",
    "output": 'D=$(dirname /a/b/c.sh); E=`basename $D`; N=$(echo "4 * 8" | bc); M=$(expr 4 \\* 2)\n'
    'torchrun x.py $D $E $N $M $(echo a b)',
    "written": 'cat > inner.sh <<EOF\ntorchrun x.py --n \\$1 $((2*3))\nEOF\nbash inner.sh 5',
    "groups": '{ A=1; B=2; }; ( C=3 ); torchrun x.py $A $B ${D-unset}',
    "indirect": 'NAME=VALUE; VALUE=7; torchrun x.py ${!NAME} "${NAME}s"',
    "exports": 'export A=1 B="2 3"; declare -a C=(4 5); readonly D=6; torchrun x.py $A "$B" ${C[@]} $D',
    "positional": 'set -euo pipefail; torchrun x.py "$#" "${@:2}" "$1"',
    "exit": 'if [ "$1" = never ]; then exit 1; fi; torchrun x.py ok; exit 0; torchrun x.py late',
}  # fmt: skip


def words_of(text: str, *positional: str, **settings: str) -> list[str]:
    shell = shell_of("a script", None, settings, positional)
    shell.read(text)
    words = list(shell.started[-1].words)
    return words[words.index("x.py") + 1 :]


@pytest.mark.parametrize("name", SNIPPETS)
def test_bash_agrees(name: str, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text(SNIPPETS[name])
    theirs = recorded(tmp_path / "script.sh", tmp_path, ["first", "second one", "third"])
    assert words_of(SNIPPETS[name], "first", "second one", "third") == theirs
    assert theirs  # bash got that far


@pytest.mark.parametrize("before", ["ssh -p 22 $H", "pdsh -R ssh -w node[0-3]", "clush -w node[0-3] -B"])
def test_scripts_for_other_machines_are_followed(before: str) -> None:
    shell = shell_of("a script", None, {}, ())
    shell.read(f'H=node1; N=4\n{before} "cd /run; torchrun --nnodes $N x.py --a \\$B" &\nwait')
    assert [shown(" ".join(s.words)) for s in shell.started] == ["torchrun --nnodes 4 x.py --a ${B}"]


def test_what_is_not_known_keeps_its_name() -> None:
    words = words_of('N=$NODES; W=$((N * 8)); H=$(hostname -f); torchrun x.py $W "a${H}b" ${1:-none}')
    assert [unknowns(w) for w in words] == [["NODES"], ["$(hostname -f)"], []]
    assert [shown(w) for w in words] == ["${NODES}", "a$(hostname -f)b", "none"]
    assert words_of("N=$NODES; W=$((N * 8)); torchrun x.py $W", NODES="3") == ["24"]


def test_what_the_user_sets_wins() -> None:
    assert words_of("TP=2; TP=$((TP * 2)); torchrun x.py $TP", TP="8") == ["8"]


def test_conditions_on_files_and_commands_are_passed_over_with_a_remark() -> None:
    shell = shell_of("a script", None, {}, ())
    shell.read("A=1\nif [ -f /etc/passwd ]; then A=2; fi\nif nvidia-smi; then A=3; fi\ntorchrun x.py $A\n")
    assert shell.started[-1].words[-1] == "1"
    assert [r.split(":")[0] for r in shell.remarks] == ["line 2", "line 3"]


def test_variables_that_nothing_sets_are_empty_in_conditions() -> None:
    assert words_of('if [ -z "$MASTER" ]; then A=1; fi; [ "$X" = "" ] && B=2; torchrun x.py $A $B') == ["1", "2"]


BROKEN = {
    'a script, line 2: the " that starts here does not end': 'A=1\nB="never\n',
    "a script, line 1: the array does not end before the end of the script": "A=(1 2\n",
    "a script, line 1: 'fi' is missing before the end of the script": "if true; then\nA=1\n",
    "a script, line 1: 'done' is missing before the end of the script": "for a in 1; do A=1\n",
    "a script, line 2: ')' is not expected here": "A=1\n)\n",
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_scripts_are_refused_with_the_line(message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(BROKEN[message], "a script")
    assert caught.value.message == message


ENDLESS = [
    "while true; do A=1; done\n" * 300,
    "f() { f; }; f",
    "A=x; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22; do A=$A$A; done",
    "(" * 200,
]


@pytest.mark.parametrize("text", ENDLESS, ids=["loop", "recursion", "growth", "depth"])
def test_endless_scripts_end(text: str) -> None:
    shell = shell_of("a script", None, {}, ())
    with pytest.raises(SchemaError):
        shell.read(text)


SUMS = {"2+3*4": 14, "-7/2": -3, "-7 % 3": -1, "08": 8, "1/0": None, "9**9": None, "(1<2)&&!(3==4)": 1, "a+1": None}


@pytest.mark.parametrize(("text", "value"), [*SUMS.items(), ("9" * 30, None), ("", None)])
def test_arithmetic(text: str, value: int | None) -> None:
    assert calculate(text) == value


def test_conditions_of_what_is_not_known() -> None:
    unset, output = mark("X", unset=True), mark("$(nproc)")
    assert holds(["-z", unset]) is True and holds(["-n", output]) is True
    assert holds([output, "-gt", "2"]) is None and holds(["a", "=", "a", "-a", output, "=", "b"]) is None
    assert holds(["!", "-e", "file"]) is None and holds(["(", "a", "=", "b", ")", "-o", "c", "=", "c"]) is True
