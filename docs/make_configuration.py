"""Writes docs/configuration.md from the schema in distill/config/schema.py.

python docs/make_configuration.py
"""

from __future__ import annotations

from pathlib import Path

from distill.config.compose import config_dir
from distill.config.reference import settings

HEAD = """# Configuration

Generated from `distill/config/schema.py` by `python docs/make_configuration.py`; a test keeps it true.

A job is composed by Hydra from `conf/job.yaml`, the groups below and your overrides: `group=choice` picks a file,
`setting=value` changes one value, `teacher.options.NAME=VALUE` adds an argument of the architecture.

Texts (paths, names) are taken as they are typed, whatever signs are in them; what the shell minds is quoted for the
shell: `"data.root=/data/My Images (2)"`. A leading `~` is your home, `${...}` another setting or a variable
(`${oc.env:SCRATCH}`; `\\${` is the two characters), `null` none. Other values follow Hydra's grammar: `[a,b]` is a
list, `['a b','c']` one whose elements have other signs. The last value of a setting counts. `--cfg job` prints what a
command would start. `hydra.searchpath=[file:///DIR]` adds choices of your own, such as `DIR/experiment/mine.yaml`.

`run=DIR` starts from the configuration of the run in that directory instead (all but its `stage`, and where its
nodes met) and goes on with that run, or prints it where it is finished. Single settings may follow, groups may not.

"""


def page() -> str:
    """Return the text of docs/configuration.md."""
    lines = ["| group | choices |", "| --- | --- |"]
    for folder in sorted(path for path in Path(config_dir()).iterdir() if path.is_dir()):
        choices = ", ".join(f"`{file.stem}`" for file in sorted(folder.glob("*.yaml")))
        lines.append(f"| `{folder.name}` | {choices} |")
    section = None
    for path, kind, default, explanation in settings():
        head = path.split(".")[0] if "." in path else "job"
        if head != section:
            section = head
            lines += ["", f"## {section}", "", "| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines.append(f"| `{path}` | {kind.replace('|', 'or')} | `{default}` | {explanation} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page())
