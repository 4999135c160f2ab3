"""A Llama of 13 million random weights: real enough for the engine, and small enough to start in seconds.

It talks nonsense and almost never ends by itself, so a test knows how many tokens an answer has: `max_tokens`.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from platformdirs import user_cache_path

_RECIPE: Final = 1  # raise it with every change below that makes another model: cached ones are then left behind
_SEED: Final = 20

# ChatML with the tool calls of the Hermes models, which vLLM reads with `--tool-call-parser hermes`.
_TOOLS_TEMPLATE: Final = """\
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = 'You are a helpful assistant.', messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\nYou may call these functions, one JSON schema a line:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '</tools>\\nTo call one, write its name and arguments as JSON:\\n' }}
    {{- '<tool_call>\\n{"name": "a-name", "arguments": {}}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in turns %}
    {%- set inside_results = not loop.first and loop.previtem.role == 'tool' %}
    {%- if message.role == 'tool' %}
        {{- '\\n' if inside_results else '<|im_start|>user\\n' }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def tiny_llama_path(*, max_positions: int = 2048, tools: bool = False) -> Path:
    """Where a tiny Llama is kept from one test run to the next."""
    kind = "tools" if tools else "plain"
    return user_cache_path("tidegate-tests") / f"tiny-llama-{_RECIPE}-{kind}-{max_positions}"


def make_tiny_llama(target: Path, tokenizer_source: Path, *, max_positions: int = 2048, tools: bool = False) -> Path:
    """The folder `target` with the model in it, written unless it is there already; the same weights every time."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as work:
        model = Path(work) / "model"
        _save_weights(model, max_positions)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tokenizer_source / name, model)
        if tools:
            (model / "chat_template.jinja").write_text(_TOOLS_TEMPLATE, encoding="utf-8")
        try:
            model.rename(target)
        except OSError:  # another test process was faster, and its model is the same
            if not target.exists():
                raise
    return target


def _save_weights(folder: Path, max_positions: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
