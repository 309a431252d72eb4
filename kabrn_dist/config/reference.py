"""The reference of all configuration keys, written from the descriptions of the fields.

`python -m kabrn_dist.config.reference > docs/configuration.md` writes the page of the documentation.
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kabrn_dist.config.run import Config
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mistakes import find_nearest_key
from kabrn_dist.utils.yaml_section import list_keys, list_sections, section_type

PAGE = """# Configuration

Every key of a configuration file, by section. Written by `python -m kabrn_dist.config.reference` from
`kabrn_dist/config/`; `mixkabrn config [SECTION|KEY]` prints parts of it.
"""
TYPE_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    types.NoneType: "null",
}


def describe_config(name: str | None = None) -> str:
    """Return the reference of the configuration, of one section, or of one key, as Markdown.

    Args:
        name: A section or key such as `model.experts` or `training.steps`; None for everything.

    Raises:
        UserError: for a name that is neither, with the nearest one.
    """
    sections = list_sections(Config)
    if name is None:
        return "\n\n".join(_section_lines(path, section) for path, section in sections.items())
    if name in sections:
        inside = {path: part for path, part in sections.items() if path == name or path.startswith(f"{name}.")}
        return "\n\n".join(_section_lines(path, section) for path, section in inside.items())
    keys = list_keys(Config)
    if name not in keys:
        near = find_nearest_key(name, keys)
        hint = f"did you mean {near}?" if near else f"sections: {', '.join(filter(None, sections))}"
        raise UserError(f"{name!r} is no section or key of the configuration; {hint}")
    return _key_lines(name, keys[name])


def _section_lines(path: str, section: type[BaseModel]) -> str:
    text = (section.__doc__ or "").split("Attributes:")[0]
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    head = f"## {path}" if path else "## Top level"
    keys = [
        _key_lines(f"{path}.{key}".lstrip("."), field)
        for key, field in section.model_fields.items()
        if field.description
    ]
    return "\n".join([head, "\n\n".join(paragraphs), *keys])


def _key_lines(key: str, field: FieldInfo) -> str:
    allowed = ", ".join(filter(None, [_type_name(field.annotation), *_limits(field)]))
    extra = field.json_schema_extra
    required = f"default {extra['left_out']}" if isinstance(extra, dict) else "required"
    default = required if field.is_required() else f"default {_default(field)}"
    return f"- **`{key}`** ({allowed}; {default}): {field.description or _summary(field)}"


def _summary(field: FieldInfo) -> str:
    section = section_type(field.annotation)
    return "" if section is None else (section.__doc__ or "").split("\n")[0]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "all defaults"
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n")
    return f"`{text.strip()}`"


def _limits(field: FieldInfo) -> list[str]:
    limits = []
    for rule in field.metadata:
        match rule:
            case annotated_types.Ge():
                limits.append(f"at least {rule.ge}")
            case annotated_types.Gt():
                limits.append(
                    "at least 1" if rule.gt == 0 and "whole" in _type_name(field.annotation) else f"above {rule.gt}"
                )
            case annotated_types.Le():
                limits.append(f"at most {rule.le}")
            case annotated_types.Lt():
                limits.append(f"below {rule.lt}")
            case annotated_types.MultipleOf():
                limits.append(f"a multiple of {rule.multiple_of}")
    return limits


def _type_name(annotation: Any) -> str:
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    return _generic_name(origin, arguments) if arguments else "section"


def _generic_name(origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    names = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
    if origin is dict:
        return f"mapping of names to {names[1]}s"
    if origin is tuple:
        return f"list of {names[0]}s" if Ellipsis in arguments else f"[{', '.join(names)}]"
    return " | ".join(names)


def main() -> None:
    """Write the page docs/configuration.md to the standard output."""
    sys.stdout.write(f"{PAGE}\n{describe_config()}\n")


if __name__ == "__main__":
    main()
