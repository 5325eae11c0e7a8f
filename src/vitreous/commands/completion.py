"""`vitreous completion`: a shell script by which Tab completes what can be typed."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal

from tyro import conf

from vitreous.base.entry import PACKAGE, item_files
from vitreous.commands import Command

POSITIONAL = typing.get_args(conf.Positional[str])[1]
ITEMS = {
    "--graft": "mechanisms",
    "--against": "mechanisms",
    "--arm": "mechanisms",
    "--task": "tasks",
    "--probes": "lens/probes",
}
SCRIPT = """\
_vitreous() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=
  if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
  else case "$before" in
{items}
    *) case "${{COMP_WORDS[1]}}" in
{options}
    esac;;
  esac; fi
  [[ "$word" == -* || "$words" != --* ]] || words=
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _vitreous vitreous
"""


@dataclass(frozen=True, kw_only=True)
class Completion(Command):
    """A script by which Tab completes commands, options, mechanisms and files.

    In the start-up file of the shell (~/.bashrc, ~/.zshrc): source <(vitreous completion bash)

    examples:
      vitreous completion bash
      vitreous completion zsh
    """

    usage: ClassVar[str] = "bash | zsh"

    shell: conf.Positional[Literal["bash", "zsh"]]

    def run(self) -> None:
        print("autoload -U +X bashcompinit && bashcompinit\n" * (self.shell == "zsh") + script(), end="")


def script() -> str:
    """The script for bash, which zsh reads, too."""
    from vitreous.commands.cli import COMMANDS, command_class  # which lists this file

    options = [f'    {name}) words="{" ".join(flags(command_class(name)))}";;' for name in COMMANDS]
    items = [
        f'    {flag}) words="{" ".join(item_files(PACKAGE / folder, nested=folder == "mechanisms"))}";;'
        for flag, folder in ITEMS.items()
    ]
    return SCRIPT.format(commands=" ".join(COMMANDS), options="\n".join(options), items="\n".join(items))


def flags(settings: type) -> list[str]:
    """The options of a dataclass of settings, as they are typed."""
    found, hints = [], typing.get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        kind, *markers = (
            typing.get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else [hints[field.name]]
        )
        if is_dataclass(kind):
            found += flags(kind)
        elif POSITIONAL not in markers:
            name = next((marker.name for marker in markers if getattr(marker, "name", None)), field.name)
            found.append(f"--{name.replace('_', '-')}")
    return found
