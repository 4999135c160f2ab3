"""Chat templates like those of the models people serve, each as peculiar as its family.

`tests/data/chat_templates` holds their texts. They take messages as vLLM hands them to a template: content is a string,
empty where there is none, and the arguments of a call are an object.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from transformers.utils.chat_template_utils import render_jinja_template

_FOLDER: Final = Path(__file__).parents[1] / "data" / "chat_templates"

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Template:
    """`alternates`: it raises unless user and assistant speak in turns, the user first."""

    name: str
    text: str = field(repr=False)
    takes_system: bool = True
    takes_tools: bool = True
    alternates: bool = False

    def render(self, messages: Sequence[Message], tools: list[Tool] | None = None) -> str:
        """The prompt, by the function that `apply_chat_template` renders with; raises `jinja2.TemplateError`."""
        prompts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.text,
            add_generation_prompt=True,
        )
        return str(prompts[0])


def _load(name: str, *, takes_system: bool = True, takes_tools: bool = True, alternates: bool = False) -> Template:
    text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Template(name, text, takes_system, takes_tools, alternates)


_ALL: Final = (
    _load("chatml", takes_tools=False),
    _load("command_r"),
    _load("deepseek"),
    _load("gemma2", takes_system=False, takes_tools=False, alternates=True),
    _load("gemma3", takes_tools=False, alternates=True),
    _load("glm4"),
    _load("hermes"),
    _load("llama3_1"),
    _load("mistral", alternates=True),
    _load("phi4_mini"),
    _load("qwen3"),
    _load("qwen3_5"),
    _load("refuses_tools", takes_tools=False),
)
TEMPLATES: Final[Mapping[str, Template]] = MappingProxyType({template.name: template for template in _ALL})
