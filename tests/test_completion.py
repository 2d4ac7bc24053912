"""Shell completion, in a real bash, zsh and fish, and the nearest name for what is unknown."""

import os
import shutil
import subprocess
import sys

import pytest

from otdd import cli
from otdd.completion import SHELLS


def printed(shell):
    code = [sys.executable, "-m", "otdd", "--print-completion", shell]
    return subprocess.run(code, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    file = tmp_path_factory.mktemp("bash") / "otdd.bash"
    file.write_text(printed("bash"))

    def answer(*words):
        script = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        script += "complete -p otdd; _otdd; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(
            ["bash", "-c", script, file, *words], capture_output=True, text=True, check=True
        )
        first, *rest = done.stdout.splitlines()
        assert first.endswith("-F _otdd otdd")
        return [word for word in rest if word]

    return answer


CASES = [
    (["otdd", "repo"], ["report"]),
    (["otdd", "help", "ru"], ["run"]),
    (["otdd", "--print-completion", "z"], ["zsh"]),
    (["otdd", "run", "--sample.guidance.str"], ["--sample.guidance.strength"]),
    (["otdd", "run", "--sample.order", "j"], ["joint"]),
    (["otdd", "run", "--train.losses", "ce", "o"], ["otm"]),
    (["otdd", "run", "--sets", "random", "kmeans-"], ["kmeans-real"]),
    (["otdd", "fit-surrogate", "--check"], ["--checkpoints"]),
    (["otdd", "encode", "--device", "cu"], ["cuda"]),
    (["otdd", "export", "runs/a", "--to", "h"], ["hf"]),
    (["otdd", "run", "--no-q"], ["--no-quiet"]),
    (["otdd", "run", "--relabel.label_format", "t"], ["topk"]),
]
GLUED = ("otdd run --sample.order=j", "--sample.order=joint")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        *CASES,
        (["otdd", "fit"], ["fit", "fit-surrogate"]),
        (["otdd", "run", "--relabel.label_f"], ["--relabel.label-format"]),  # as in files
        (["otdd", "env", "--"], ["--json", "--debug", "--help"]),
        (["otdd", "run", "--sample.order", "=", "j"], ["joint"]),  # how bash splits --flag=
        (["otdd", "run", "--data", "d"], []),  # a path: left to bash
    ],
)
def test_bash_completes(complete, words, wanted):
    assert complete(*words) == wanted


@pytest.fixture(scope="module")
def fish(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fish")
    (folder / "otdd.fish").write_text(printed("fish"))
    (folder / "dogs").mkdir()

    def answer(line):
        script = "source otdd.fish; complete -C $argv[1]"
        done = subprocess.run(
            ["fish", "--no-config", "-c", script, line],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        )
        assert not done.stderr
        return [word.split("\t")[0] for word in done.stdout.splitlines()]

    return answer


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        *((" ".join(words), wanted) for words, wanted in CASES),
        (GLUED[0], [GLUED[1]]),
        ("otdd fit", ["fit", "fit-surrogate"]),
        ("otdd run --relabel.label_f", ["--relabel.label-format"]),  # as in files
        ("otdd env --", ["--debug", "--help", "--json"]),
        ("otdd run --data d", ["dogs/"]),
        ("otdd export d", ["dogs/"]),
    ],
)
def test_fish_completes(fish, line, wanted):
    assert fish(line) == wanted


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'source otdd.zsh; tell() { print -r -- $BUFFER >> told; BUFFER= }; zle -N tell'
zpty -w shell 'bindkey "^X" tell; print ready > told'
heard() {
  repeat 400; do
    while zpty -r -t shell junk; do :; done
    [[ -f told ]] && (( $(wc -l < told) >= $1 )) && return
    sleep 0.05
  done
  exit 1
}
heard 1
count=1
for line in "$@"; do
  zpty -w -n shell "$line"$'\t\x18'
  (( count += 1 ))
  heard $count
done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes(tmp_path):
    """What stands in the line of an interactive zsh after Tab."""
    (tmp_path / "otdd.zsh").write_text(printed("zsh"))
    (tmp_path / "dogs").mkdir()
    cases = [(" ".join(words), wanted[0]) for words, wanted in CASES]
    cases += [GLUED, ("otdd run --data d", "dogs/"), ("otdd fit-", "fit-surrogate")]
    script = tmp_path / "keys.zsh"
    script.write_text(ZSH)
    command = ["zsh", "-f", script.name, *(line for line, _ in cases)]
    environment = os.environ | {"HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "xterm"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    told = [line.split()[-1] for line in (tmp_path / "told").read_text().splitlines()]
    assert told == ["ready", *(wanted for _, wanted in cases)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean run?"),
        (["run", "--sample.guidanc.strenth", "1"], "did you mean --sample.guidance.strength?"),
        (["fit", "--stepz=3"], "unknown flag --stepz; did you mean --steps?"),
        (["run", "--qqqq"], "unknown flag --qqqq; otdd run --help lists all"),
        (["--print-completion", "csh"], f"csh is not accepted; one of {', '.join(SHELLS)}"),
    ],
)
def test_the_nearest_name_is_told(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
