"""YAML read strictly, and with limits: an alias that stands for much is counted as much, and what is too deep, too long
or too large is refused before it is built.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import yaml

from orchestrator.errors import RecipeError
from quant_spec.messages import shown

#: Characters of a text, levels of nesting, and values in all; an alias counts as what it stands for.
LONGEST, DEEPEST, MOST_VALUES = 256 << 10, 64, 10_000
#: Characters of a number.
_LONGEST_NUMBER = 64


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, a date is text, a key that stands twice is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._total = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and count the values that it stands for."""
        event: Any = self.peek_event()
        before = self._total
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"got more than {DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                # Its marks are of another type in types-PyYAML than a MarkedYAMLError takes.
                mark: Any = event.start_mark
                raise yaml.composer.ComposerError(None, None, f"got *{event.anchor} within what it stands for", mark)
            self._total += self._sizes[id(node)]
        else:
            self._total += 1
            self._sizes[id(node)] = self._total - before
        if self._total > MOST_VALUES:
            problem = f"got more than {MOST_VALUES} values, with all that aliases stand for"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return node


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in result:
            what = "twice" if isinstance(key, str) else "where a name belongs"
            raise yaml.constructor.ConstructorError(None, None, f"got key {shown(key)} {what}", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Read an integer; one of thousands of digits takes long to read, and cannot be shown."""
    if len(node.value) > _LONGEST_NUMBER:
        problem = f"got a number of {len(node.value)} characters"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return int(yaml.SafeLoader.construct_yaml_int(loader, node))


_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML; RecipeError says where it is wrong, or beyond the limits of this module."""
    if len(text) > LONGEST:
        raise RecipeError(f"{what}: got {len(text)} characters, wanted at most {LONGEST}")
    try:
        return copy.deepcopy(_parsed(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" line {mark.line + 1}"
        raise RecipeError(f"{what}{place}: {error.problem or 'not YAML'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what}: got something that is not YAML ({str(error).splitlines()[0]})") from error


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parse YAML; kept, as all recipes extend the same few files and parsing one takes milliseconds."""
    return yaml.load(text, Loader=_Loader)
