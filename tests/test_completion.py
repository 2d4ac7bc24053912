"""Shell completion, in a real bash, and the nearest name for what is unknown."""

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


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["otdd", "fit"], ["fit", "fit-surrogate"]),
        (["otdd", "run", "--sample.guidance.str"], ["--sample.guidance.strength"]),
        (["otdd", "run", "--sample.order", "j"], ["joint"]),
        (["otdd", "run", "--train.losses", "ce", "o"], ["otm"]),
        (["otdd", "run", "--sets", "random", "kmeans-"], ["kmeans-real"]),
        (["otdd", "fit-surrogate", "--check"], ["--checkpoints"]),
        (["otdd", "encode", "--device", "cu"], ["cuda"]),
        (["otdd", "export", "runs/a", "--to", "h"], ["hf"]),
        (["otdd", "run", "--no_q"], ["--no_quiet"]),
        (["otdd", "env", "--"], ["--json", "--help"]),
        (["otdd", "run", "--data", "d"], []),  # a path: left to bash
    ],
)
def test_bash_completes(complete, words, wanted):
    assert complete(*words) == wanted


def test_other_shells_know_the_same_words():
    zsh, fish = printed("zsh"), printed("fish")
    assert "bashcompinit" in zsh
    assert "--sample.guidance.strength" in zsh
    assert "-l sample.order -x -a 'joint sequential'" in fish


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
