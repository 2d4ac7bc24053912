"""Completion for shells: commands, flags and choices as tables in a script that needs no Python."""

from __future__ import annotations

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, commands: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """The script of a shell.

    Args:
        shell: one of `SHELLS`.
        commands: name -> flag -> choices.
    """
    if shell == "fish":
        return _fish(commands)
    body = _bash(commands)
    if shell == "zsh":  # which has bash's `complete` once it is asked for
        head = "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\n"
        return head + "bashcompinit\n" + body
    return body


def _bash(commands: dict[str, dict[str, tuple[str, ...]]]) -> str:
    flags = [f'    {name}) words="{" ".join(known)}" ;;' for name, known in commands.items()]
    taken = [
        f'    {name}:{flag}) words="{" ".join(choices)}" ;;'
        for name, known in commands.items()
        for flag, choices in known.items()
        if choices
    ]
    # The last flag before the cursor, since a flag may take several words.
    return f"""\
_otdd() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} flag= words= i
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$cur"))
    return
  fi
  for (( i = COMP_CWORD - 1; i > 1; i-- )); do
    case ${{COMP_WORDS[i]}} in --*) flag=${{COMP_WORDS[i]}}; break ;; esac
  done
  case $cur in
  -*)
    case $command in
{chr(10).join(flags)}
    esac ;;
  *)
    case $command:$flag in
{chr(10).join(taken)}
    esac ;;
  esac
  [[ -n $words ]] && COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o bashdefault -o default -F _otdd otdd
"""


def _fish(commands: dict[str, dict[str, tuple[str, ...]]]) -> str:
    first = "complete -c otdd -n __fish_use_subcommand"
    lines = [f"{first} -f -a '{' '.join(commands)}'"]
    for name, known in commands.items():
        here = f"complete -c otdd -n '__fish_seen_subcommand_from {name}'"
        for flag, choices in known.items():
            takes = f" -x -a '{' '.join(choices)}'" if choices else ""
            lines.append(f"{here} -l {flag.removeprefix('--')}{takes}")
    return "\n".join(lines) + "\n"
