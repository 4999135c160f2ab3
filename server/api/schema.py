"""The OpenAPI document, with the request bodies that only the running engine knows."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from server.serving.service import Service


class DocumentedApi(FastAPI):
    """A FastAPI application whose document grows by the bodies of the engine's operations once it serves."""

    service: Service

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for (method, path), schema in self.service.body_schemas().items():
            operation = document["paths"].get(path, {}).get(method.lower())
            if operation is not None and "requestBody" not in operation:
                operation["requestBody"] = _body(document, schema)
        return document


def _body(document: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The body object, its definitions moved to where the document keeps them all."""
    definitions = document.setdefault("components", {}).setdefault("schemas", {})
    definitions.update(schema.get("$defs", {}))
    inline = {key: value for key, value in schema.items() if key != "$defs"}
    return {"required": True, "content": {"application/json": {"schema": inline}}}
