"""How the packages of an optional extra are installed: one wording for every message that misses one.

It is right for ingot from an index and for a checkout (`pip install -e .`) alike, from any folder: pip finds ingot
installed and gets what the extra adds. No path is named, as some of these messages reach clients over HTTP.
"""


def pip_install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, and where it is run."""
    return f"`pip install 'ingot[{extra}]'` in ingot's environment"
