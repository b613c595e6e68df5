"""YAML file + ``section.key=value`` overrides -> one frozen, validated config that knows where each value is from."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayllm.errors import InputError

HUB_PREFIX = "hf:/"
"""How a path on the Hugging Face hub begins; ``Path`` makes one slash of two."""


def is_on_hub(path: Path) -> bool:
    """Whether a config's path names something on the hub, as ``hf://ORG/NAME``."""
    return str(path).startswith(HUB_PREFIX)


def is_remote(path: Path) -> bool:
    """Whether a config's path names something on storage, as ``s3://BUCKET/NAME``."""
    return re.match(r"(?!hf:)[a-z][a-z0-9+.-]+:/", str(path)) is not None


def as_uri(path: Path) -> str:
    """The address that a remote path was given as; ``Path`` makes one slash of two."""
    scheme, _, rest = str(path).partition(":/")
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


class Config(BaseModel):
    """Base of every config section: immutable, unknown keys are errors, field docstrings become the help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, tree: Any) -> Any:
        """A partly given section takes the rest from the default of its place, not of its class: the policy's
        optimizer and the critic's have other defaults."""
        if not isinstance(tree, dict):
            return tree
        filled = dict(tree)
        for name, info in cls.model_fields.items():
            given, usual = tree.get(name), _default_of(info)
            if isinstance(given, dict) and isinstance(usual, Config):
                filled[name] = merge(usual.model_dump(), given)
        return filled

    @field_validator("*", mode="after")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Workers run in other folders than the command: paths are absolute from here on."""
        if isinstance(value, dict):
            return {key: cls._absolute(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(cls._absolute(item) for item in value)
        if not isinstance(value, Path) or is_on_hub(value) or is_remote(value):
            return value
        return value.expanduser().absolute()


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs from its default."""

    value: Any
    default: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded(Generic[ConfigT]):
    """A config and, for every key that was given, where it came from."""

    config: ConfigT
    origins: dict[str, str] = field(default_factory=dict)

    def changes(self) -> dict[str, Change]:
        """Dotted key -> value, default and origin, for all values that differ from their defaults."""
        found: dict[str, Change] = {}
        for key, value, default in _leaves(self.config, None):
            if value != default:
                origin = self.origins.get(key) or _nearest_origin(self.origins, key)
                found[key] = Change(value, default, origin)
        return found


def load_config(
    cls: type[ConfigT], path: Path | Sequence[Path] | None = None, overrides: Sequence[str] = ()
) -> Loaded[ConfigT]:
    """Read the file or files, later ones over earlier ones, apply overrides from left to right, validate.

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest known one), bad value.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in [path] if isinstance(path, Path) else path or ():
        given, lines = read_yaml(file)
        tree = merge(tree, given)
        origins |= lines
    text_keys = set(_text_keys(cls))
    for override in overrides:
        apply_override(tree, origins, override, text_keys)
    return validate(cls, tree, origins)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's mapping and, per dotted key, ``file:line``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config: cannot read {path}: {error.strerror}") from None
    try:
        tree = yaml.safe_load(text) or {}
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected 'key: value' lines, got a {type(tree).__name__}")
    origins: dict[str, str] = {}
    _collect_origins(node, "", path, origins)
    return tree, origins


def apply_override(
    tree: dict[str, Any], origins: dict[str, str], override: str, text_keys: Collection[str] = ()
) -> None:
    """Set ``section.key=value`` in ``tree``; the value is read as YAML, or taken as it is for ``text_keys``."""
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise InputError(f"{override!r}: expected section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{override!r}: {parent!r} is a value, not a section")
    try:
        node[leaf] = text if key in text_keys and text != "null" else yaml.safe_load(text)
    except yaml.YAMLError:
        node[leaf] = text
    origins[key] = "command line"


def validate(cls: type[ConfigT], tree: dict[str, Any], origins: dict[str, str]) -> Loaded[ConfigT]:
    """Build the config from plain data; pydantic's errors become lines that name key, value and fix."""
    try:
        return Loaded(cls.model_validate(tree), origins)
    except ValidationError as error:
        lines = [_explain(cls, e, origins) for e in error.errors()]
        raise InputError("\n".join(lines)) from None


def describe_fields(
    cls: type[Config], prefix: str = "", default: Config | None = None
) -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, docstring) of every field, sections expanded, in order of definition."""
    rows: list[tuple[str, str, str, str]] = []
    for name, info in cls.model_fields.items():
        value = _default_of(info) if default is None else getattr(default, name)
        section = _section_of(info)
        if section is not None:
            rows.extend(describe_fields(section, f"{prefix}{name}.", value if isinstance(value, Config) else None))
            continue
        doc = " ".join((info.description or "").split())
        required = default is None and info.is_required()
        rows.append((prefix + name, _type_name(info.annotation), "required" if required else _written(value), doc))
    return rows


def _section_of(info: FieldInfo) -> type[Config] | None:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def _text_keys(cls: type[Config], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values are text, whatever it looks like."""
    for name, info in cls.model_fields.items():
        section = _section_of(info)
        if section is not None:
            yield from _text_keys(section, f"{prefix}{name}.")
        elif info.annotation in (str, str | None):
            yield prefix + name


def _type_name(kind: Any) -> str:
    """As one would write it in YAML: no names of Python's or pydantic's own."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return f"one of [{', '.join(arguments)}]"
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type_name, arguments)))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{{NAME: {_type_name(arguments[1])}}}"
    if issubclass(kind, Config):
        fields = kind.model_fields
        return "{kind, ...}" if "kind" in fields else f"{{{', '.join(fields)}}}"
    return {"NoneType": "null", "Any": "any"}.get(kind.__name__, kind.__name__)


def _written(value: Any) -> str:
    """A default, as in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _default_of(info: FieldInfo) -> Any:
    return None if info.default is PydanticUndefined else info.get_default(call_default_factory=True)


def _leaves(config: Config, default: Config | None, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value, default) of every field; a section's defaults are those of its place, not of its class."""
    rows = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        usual = _default_of(info) if default is None else getattr(default, name)
        if isinstance(value, Config):
            rows.extend(_leaves(value, usual if isinstance(usual, Config) else None, f"{prefix}{name}."))
            continue
        rows.append((prefix + name, _plain(value), _plain(usual)))
    return rows


def _plain(value: Any) -> Any:
    """A mapping of sections as plain data, what differs from their defaults and their kind; all else as it is."""
    if not isinstance(value, dict):
        return value
    plain = {}
    for key, item in value.items():
        if isinstance(item, Config):
            kind = item.model_dump(include={"kind"})
            item = kind | item.model_dump(mode="json", exclude_defaults=True)
        plain[key] = item
    return plain


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section. No section of the result is one of ``over``: with YAML's
    aliases two of its sections may be one object, and an override of one would change the other."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        merged[key] = merge(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def _nearest_origin(origins: dict[str, str], key: str) -> str:
    """A value inside a mapping or list is known by the key of the whole; else code set it."""
    inside = [origin for name, origin in origins.items() if name.startswith(key + ".")]
    return inside[0] if inside else "set by the caller"


def _collect_origins(node: yaml.Node | None, prefix: str, path: Path, origins: dict[str, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        origins[key] = f"{path}:{key_node.start_mark.line + 1}"
        _collect_origins(value_node, key + ".", path, origins)


def _explain(cls: type[Config], error: Any, origins: dict[str, str]) -> str:
    parts = [str(part) for part in error["loc"]]
    # In a mapping of sections that are told apart by their kind, pydantic names the kind as well; it is no key.
    key = ".".join(part for place, part in enumerate(parts) if "sources" not in parts[:place][-2:-1])
    origin = origins.get(key)
    where = "" if origin in (None, "command line") else f"{origin}: "
    if error["type"] == "extra_forbidden":
        return f"{where}{key}: unknown key. {_did_you_mean(cls, key)}"
    if error["type"] == "missing":
        docs = {name: doc for name, _, _, doc in describe_fields(cls)}
        return f"{key}: required but not given. {docs.get(key, '')}".rstrip()
    message = error["msg"].removeprefix("Value error, ")
    if not key:  # a rule across fields names its keys itself
        return message
    if error["type"] == "value_error":
        return f"{where}{key}: {message}"
    return f"{where}{key}: got {error['input']!r}; {message[0].lower() + message[1:]}"


def _did_you_mean(cls: type[Config], key: str) -> str:
    rows = {name: (default, doc) for name, _, default, doc in describe_fields(cls)}
    sections = {name.rsplit(".", 1)[0] for name in rows if "." in name}
    names = list(rows) + sorted(sections)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in rows}
        near = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
    if not near:
        section = key.rsplit(".", 1)[0] + "." if "." in key else ""
        known = sorted({n[len(section):].split(".")[0] for n in names if n.startswith(section)})
        return f"Known here: {', '.join(known)}"
    if near[0] in rows:
        default, doc = rows[near[0]]
        return f"Did you mean {near[0]} (default {default})? {doc}"
    return f"Did you mean the section {near[0]}?"
