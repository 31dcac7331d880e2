"""A shell on a machine: what runs there, for the commands by which providers get in."""

from __future__ import annotations

# $1: the machine's folder. A workspace, if it has one, is where files are; the packages of its
# newest environment come first. bash, where there is one, is what most people mean by a shell.
_SCRIPT = """
cd "$1" 2>/dev/null || cd
for d in workspaces/*/; do [ -d "$d" ] && cd "$d"; break; done
for d in $(ls -td "$1"/environments/*/bin 2>/dev/null); do PATH="$d:$PATH"; break; done
export PATH
command -v bash >/dev/null && exec bash -i
exec "${SHELL:-sh}" -i
"""


def argv(folder: str) -> list[str]:
    """The command there, with a terminal around it; ``folder`` is the machine's."""
    return ["sh", "-c", _SCRIPT.strip(), "shell", folder]
