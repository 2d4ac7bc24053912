"""Completion for shells: commands, flags and choices as tables in a script that needs no Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

SHELLS = ("bash", "zsh", "fish")
Commands = Mapping[str, Mapping[str, tuple[str, ...]]]


def script(shell: str, commands: Commands) -> str:
    """The script of a shell.

    Args:
        shell: one of `SHELLS`.
        commands: first word -> flag -> choices of its value; the flag "" stands for what comes
            before any flag.
    """
    if shell == "fish":
        return _fish(commands)
    body = _bash(commands)
    if shell == "zsh":  # which has bash's `complete` once it is asked for
        head = "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\n"
        return head + "bashcompinit\n" + body
    return body


def _flags(commands: Commands) -> Iterator[tuple[str, str]]:
    """Every command, and its flags in one line."""
    for name, known in commands.items():
        yield name, " ".join(flag for flag in known if flag)


def _choices(commands: Commands) -> Iterator[tuple[str, str]]:
    """Every `command:flag` that takes one of some words, and these in one line."""
    for name, known in commands.items():
        for flag, choices in known.items():
            if choices:
                yield f"{name}:{flag}", " ".join(choices)


def _bash(commands: Commands) -> str:
    flags = [f'    {name}) words="{known}" ;;' for name, known in _flags(commands)]
    taken = [f'    {key}) words="{choices}" ;;' for key, choices in _choices(commands)]
    # The value is of the last flag before the cursor, since a flag may take several words. Bash
    # has made `--flag=` a word of its own, zsh has not.
    return f"""\
_otdd() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} flag= words= glued= i
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$cur"))
    return
  fi
  for (( i = COMP_CWORD - 1; i > 1; i-- )); do
    case ${{COMP_WORDS[i]}} in --*) flag=${{COMP_WORDS[i]}}; break ;; esac
  done
  case $cur in
  --*=*) flag=${{cur%%=*}} glued=$flag= cur=${{cur#*=}} ;;
  esac
  case $cur in
  -*)
    cur=${{cur//_/-}}
    case $command in
{chr(10).join(flags)}
    esac ;;
  *)
    case $command:${{flag//_/-}} in
{chr(10).join(taken)}
    esac ;;
  esac
  [[ -n $words ]] && COMPREPLY=($(compgen -P "$glued" -W "$words" -- "$cur"))
}}
complete -o bashdefault -o default -F _otdd otdd
"""


def _fish(commands: Commands) -> str:
    case = "            case {}\n                set words {}"
    flags = [case.format(name, known) for name, known in _flags(commands)]
    taken = [case.format(key, choices) for key, choices in _choices(commands)]
    return f"""\
function __otdd
    set -l before (commandline -opc)
    set -l cur (commandline -ct)
    set -l flag ''
    set -l glued ''
    set -l words
    if test (count $before) -eq 1
        string join \\n -- {" ".join(commands)} --help --version
        return
    end
    for word in $before[3..-1]
        string match -q -- '--*' $word; and set flag $word
    end
    if string match -q -- '--*=*' $cur
        set flag (string split -m 1 = -- $cur)[1]
        set glued $flag=
    end
    if string match -q -- '-*' $cur; and test -z "$glued"
        switch $before[2]
{chr(10).join(flags)}
        end
    else
        switch $before[2]:(string replace -a _ - -- $flag)
{chr(10).join(taken)}
            case '*'
                __fish_complete_path $cur
        end
    end
    string join \\n -- $glued$words
end
complete -c otdd -f -a '(__otdd)'
"""
