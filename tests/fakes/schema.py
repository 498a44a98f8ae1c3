"""The part of JSON Schema that `jobset.schema.json` uses: type, properties, required, items, enum, pattern, $ref."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
JOBSET = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "$") -> list[str]:
    """List where `value` departs from the schema; a field that the schema does not name is one."""
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    kind = TYPES[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if kind is dict:
        known = schema.get("properties", {})
        found += [f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, inner in value.items():
            if name in known:
                found += violations(inner, known[name], root, f"{where}.{name}")
            elif "additionalProperties" in schema:
                found += violations(inner, schema["additionalProperties"], root, f"{where}.{name}")
            else:
                found.append(f"{where}: {name} is unknown")
    if kind is list:
        for number, inner in enumerate(value):
            found += violations(inner, schema["items"], root, f"{where}[{number}]")
    return found
