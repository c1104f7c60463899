"""The YAML at the top of a card, which the Hub reads by YAML 1.2 and PyYAML by YAML 1.1.

    dump_yaml({"license": "no", "revision": "1e3"})            # license: 'no', revision: '1e3': text in both
    with_names("language: no\\nlicense: mit", {"license": "cc0"})  # the line `language: no` stays as it is

In YAML 1.1 `no`, `on` and `0o7` differ from YAML 1.2, and `1e3` is text. So the user's values are not
read and written again: only the names that change are replaced.
"""

from __future__ import annotations

import re
from typing import Any

from cloze.errors import HubError
from cloze.utils.foreign.json_yaml import check_events, parse_yaml, yaml_problem

# Numbers of YAML 1.2 that PyYAML would take for text.
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|0o[0-7]+$|[-+]?0x[0-9a-fA-F]+$")


def dump_yaml(values: Any) -> str:
    """Return values as YAML in which text stays text for readers of YAML 1.1 and 1.2."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what either version would read as something else, and writes no aliases."""

        def ignore_aliases(self, _: Any) -> bool:
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    return str(yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)).strip()


def metadata_names(text: str) -> list[str]:
    """Return the names of a card's metadata. Raises HubError if they are not a mapping without aliases and tags."""
    return list(parse_yaml(text, "README.md", error=HubError))


def with_names(text: str, values: dict[str, Any]) -> str:
    """Return a YAML mapping in which some names have other values, and all other lines are as they were. Raises
    HubError if it is not a mapping of names on lines of their own."""
    import yaml

    try:
        check_events(text, "README.md", HubError)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        raise HubError(f"not YAML ({yaml_problem(problem)})", where="README.md", hint="correct it") from None
    if not isinstance(node, yaml.MappingNode):
        raise HubError("holds no names with values", where="README.md", hint="write `name: value` lines")
    if node.flow_style:
        return dump_yaml(parse_yaml(text, "README.md", error=HubError) | values)
    lines = text.split("\n")
    begins = [key.start_mark.line for key, _ in node.value] + [len(lines)]
    for number in reversed(range(len(node.value))):
        key = node.value[number][0]
        if key.value in values:
            del lines[begins[number] : begins[number + 1]]
    return "\n".join([*lines, dump_yaml(values)]).strip("\n")
