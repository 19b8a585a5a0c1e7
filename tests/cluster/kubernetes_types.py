"""Checks a Kubernetes document as the API server does under `kubectl apply --validate=strict`: types, names, enums.

Kubernetes' own kinds are checked with the types of the package `kubernetes`, KubeRay's with its CRD (schemas/).
"""

import json
import re
from pathlib import Path

from kubernetes import client

SCHEMAS = Path(__file__).parent / "schemas"
KINDS = {
    ("v1", "ServiceAccount"): "V1ServiceAccount",
    ("v1", "ConfigMap"): "V1ConfigMap",
    ("v1", "Service"): "V1Service",
    ("apps/v1", "Deployment"): "V1Deployment",
    ("batch/v1", "Job"): "V1Job",
}
QUANTITY = re.compile(r"(\d+(\.\d*)?|\.\d+)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
# fields that the package types as `object`, since each is a number or a text
PORT_FIELDS = {"port", "targetPort"}
JSON_TYPES = {"str": str, "int": int, "bool": bool, "float": (int, float)}
SCHEMA_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "number": (int, float)}


def problems(document: dict, kuberay: str) -> list[str]:
    """What is wrong with a document; `kuberay` is a version whose CRDs are in schemas/."""
    kind = document["kind"]
    if document["apiVersion"] == "ray.io/v1":
        schema = json.loads((SCHEMAS / f"kuberay-{kuberay}.json").read_text())["kinds"][kind]
        return list(_against_schema(document, schema, kind))
    return list(_against_type(document, KINDS[document["apiVersion"], kind], kind))


def _is(value: object, expected: type | tuple) -> bool:
    return isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool)


def _against_type(value: object, kind: str, path: str):
    """Compare with a type of the package, such as `list[V1Container]`, `dict[str, str]`, `V1PodSpec` or `int`."""
    if listed := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: {value!r} is not a list"
            return
        for n, item in enumerate(value):
            yield from _against_type(item, listed[1], f"{path}[{n}]")
    elif mapped := re.fullmatch(r"dict\[str, (.*)\]", kind):
        if not isinstance(value, dict):
            yield f"{path}: {value!r} is not a mapping"
            return
        for name, item in value.items():
            inner = "quantity" if path.endswith((".requests", ".limits")) else mapped[1]
            yield from _against_type(item, inner, f"{path}.{name}")
    elif kind == "quantity":
        if not (isinstance(value, str | int) and QUANTITY.fullmatch(str(value))):
            yield f"{path}: {value!r} is not a quantity"
    elif kind in JSON_TYPES:
        if not _is(value, JSON_TYPES[kind]):
            yield f"{path}: {value!r} is not of type {kind}"
    elif kind == "object":
        if path.rpartition(".")[2] in PORT_FIELDS and not _is(value, (str, int)):
            yield f"{path}: {value!r} is neither a port nor the name of one"
    else:
        yield from _against_model(value, getattr(client, kind), path)


def _against_model(value: object, model: type, path: str):
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is not a mapping"
        return
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    for key, item in value.items():
        if key not in names:
            yield f"{path}: unknown field {key}"
        else:
            yield from _against_type(item, model.openapi_types[names[key]], f"{path}.{key}")
    try:  # the constructor knows which fields are required
        model(**{names[key]: item for key, item in value.items() if key in names})
    except ValueError as error:
        yield f"{path}: {error}"


def _against_schema(value: object, schema: dict, path: str):
    """Compare with a structural schema of a CRD (OpenAPI v3)."""
    if "kubernetes" in schema:
        yield from _against_type(value, schema["kubernetes"], path)
        return
    if schema.get("x-kubernetes-int-or-string"):
        if not _is(value, (str, int)):
            yield f"{path}: {value!r} is neither a number nor a text"
        return
    if not _is(value, SCHEMA_TYPES[schema["type"]]):
        yield f"{path}: {value!r} is not of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is not one of {schema['enum']}"
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _against_schema(item, schema["items"], f"{path}[{n}]")
    if not isinstance(value, dict) or ("properties" not in schema and "additionalProperties" not in schema):
        return
    for name in schema.get("required", []):
        if name not in value and "default" not in schema["properties"].get(name, {}):
            yield f"{path}: {name} is missing"
    for name, item in value.items():
        inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if inner is None:
            yield f"{path}: unknown field {name}"
        else:
            yield from _against_schema(item, inner, f"{path}.{name}")
