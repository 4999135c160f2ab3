"""Finds the text of a model's chat template without loading its tokenizer."""

import json
from pathlib import Path

from transformers.utils import cached_file


def read_chat_template(model: str, override: str | None, revision: str | None) -> str | None:
    """The template that will be used: the operator's (a path or the text itself), else the model's own."""
    if override is not None:
        path = Path(override)
        return path.read_text(encoding="utf-8") if path.is_file() else override
    if (jinja := _model_file(model, "chat_template.jinja", revision)) is not None:
        return jinja.read_text(encoding="utf-8")
    if (config := _model_file(model, "tokenizer_config.json", revision)) is None:
        return None
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):  # named templates; vLLM takes `tool_use` for requests with tools
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("tool_use") or named.get("default")
    return template if isinstance(template, str) else None


def _model_file(model: str, name: str, revision: str | None) -> Path | None:
    found = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
