"""Chooses vLLM's tool-call parser and reasoning parser from the model's family and its chat template, by two tables."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

Thinking = Literal["open", "closed", "silent"]


@dataclass(frozen=True, slots=True)
class ParserChoice:
    """Names as vLLM registers them. `renders_tools`: a request's tools reach the prompt. `reason` is for the log."""

    tool_call_parser: str | None
    reasoning_parser: str | None
    renders_tools: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A row: the parser to take if every condition given holds."""

    parser: str
    families: frozenset[str] = frozenset()  # one is the model type or an architecture
    marks: tuple[str, ...] = ()  # all stand in the chat template
    lacks: tuple[str, ...] = ()  # none stands in the chat template
    names: tuple[str, ...] = ()  # one stands in the model's name, in lower case
    thinking: frozenset[Thinking] = frozenset()  # where the prompt leaves `<think>` when the client asks for nothing
    engine_renders: bool = False  # vLLM writes this family's prompts itself, tools included
    package: str = ""  # must be installed


@dataclass(frozen=True, slots=True)
class _Model:
    families: frozenset[str]
    name: str
    template: str
    thinking: Thinking | None
    installed: Callable[[str], bool]


_JINJA: Final = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
# transformers' own tags, which plain Jinja does not know; they only mark text.
_GENERATION_TAG: Final = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)
_STRING: Final = re.compile(r"'[^']*'|\"[^\"]*\"")
_CODE: Final = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_QUESTION: Final = "What is the tide?"
_RENDER_ERRORS: Final = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_OPEN: Final[frozenset[Thinking]] = frozenset({"open"})
_CLOSED: Final[frozenset[Thinking]] = frozenset({"closed"})
_NOT_CLOSED: Final[frozenset[Thinking]] = frozenset({"open", "silent"})
_ANY_JINJA: Final = ("{",)  # as `lacks`: the model has no template
_MELODY: Final = "cohere_melody"
# DeepSeek writes its markers with a full-width bar and a block for the space.
_DEEPSEEK_CALLS: Final = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
_DEEPSEEK_ASSISTANT: Final = "<\uff5cAssistant\uff5c>"

_COHERE4: Final = frozenset({"cohere2_moe", "Cohere2MoeForCausalLM"})
_ERNIE: Final = frozenset({"ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe"})
_GRANITE: Final = frozenset({"granite", "granite_swa", "granitemoe", "granitemoehybrid", "granitemoeshared"})
_LFM2: Final = frozenset({"lfm2", "lfm2_moe", "lfm2_vl"})
_LING3: Final = frozenset({"BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"})
_MIMO: Final = frozenset({"MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM"})
_MISTRAL: Final = frozenset({"mistral3", "mistral4", "ministral3", "pixtral", "MistralLarge3ForCausalLM"})
_OLMO: Final = frozenset({"olmo2", "olmo3", "olmo_hybrid"})
_QWEN2: Final = frozenset({"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"})
_QWEN3: Final = frozenset({"qwen3", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe"})
_STEP35: Final = frozenset({"step3p5", "step3p7"})
# Official Mistral models before `mistral3`; older and foreign ones may lack the token that the parser insists on.
_MISTRAL_NAMES: Final = ("devstral", "magistral", "mistral-large", "mistral-medium", "mistral-nemo", "mistral-small")

# The first row that holds wins. Families come before generic marks, and narrow marks before wide ones.
TOOL_RULES: Final = (
    Rule("openai", frozenset({"gpt_oss"}), engine_renders=True),
    Rule("deepseek_v32", frozenset({"deepseek_v32"}), engine_renders=True),
    Rule("deepseek_v4", frozenset({"deepseek_v4"}), engine_renders=True),
    Rule("deepseek_v41", frozenset({"deepseek_v41"}), engine_renders=True),
    Rule("kimi_k3", frozenset({"kimi_k3"}), engine_renders=True),
    Rule("inkling", frozenset({"inkling_mm_model", "inkling_model"}), engine_renders=True),
    Rule("mistral", _MISTRAL, lacks=_ANY_JINJA, engine_renders=True),
    Rule("mistral", frozenset({"mistral"}), lacks=_ANY_JINJA, names=_MISTRAL_NAMES, engine_renders=True),
    Rule("deepseek_v31", marks=(_DEEPSEEK_CALLS, "not thinking")),
    Rule("deepseek_v3", marks=(_DEEPSEEK_CALLS,)),
    Rule("kimi_k2", marks=("<|tool_calls_section_begin|>",)),
    Rule("minimax_m3", marks=("]<]minimax[>[",)),
    Rule("minimax_m2", marks=("<minimax:tool_call>",)),
    Rule("seed_oss", marks=("<seed:tool_call>",)),
    Rule("gemma4", marks=("<|tool_call>call:",)),
    Rule("functiongemma", marks=("<start_function_call>",)),
    Rule("apertus", marks=("<|tools_prefix|>",)),
    Rule("k2_horizon", marks=("<ifm|tool_call>",)),
    Rule("dots", marks=("<dots_function_call>",)),
    Rule("plamo3", marks=("<|plamo:begin_tool_request",)),
    Rule("muse_glimmer", marks=("atem:function_calls",)),
    Rule("longcat", marks=("<longcat_tool_call>",)),
    Rule("step3", marks=("<steptml:invoke",)),
    Rule("internlm", marks=("<|action_start|>",)),
    Rule("gigachat3", marks=("<|role_sep|>", "function_call")),
    Rule("minicpm5", marks=("<function name=",)),
    Rule("cohere_command4", _COHERE4, ("<|START_ACTION|>",), package=_MELODY),
    Rule("cohere_command3", marks=("<|START_ACTION|>",), package=_MELODY),
    Rule("granite-20b-fc", marks=("<|function_call_library|>", "<function_call>")),
    Rule("hunyuan_a13b", frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"}), ("<tool_calls>[",)),
    Rule("phi4_mini_json", marks=("functools[",)),
    Rule("olmo3", _OLMO, ("<function_calls>",)),
    Rule("xlam", marks=("make calls in a single JSON array",)),
    Rule("llama4_pythonic", frozenset({"llama4"}), ("[func_name1(",)),
    Rule("pythonic", marks=("[func_name1(",)),
    Rule("llama3_json", marks=("<|start_header_id|>ipython", '"parameters": dictionary')),
    Rule("mistral", marks=("[TOOL_CALLS]",)),
    Rule("lfm2", _LFM2),
    Rule("hy_v3", frozenset({"hy_v3"})),
    Rule("hy_v4", frozenset({"hy_v4"})),
    Rule("jamba", frozenset({"jamba"}), ("<tool_calls>",)),
    # From here on, many families write <tool_call>, and what stands inside tells them apart.
    Rule("poolside_v1", frozenset({"laguna"}), ("<arg_key>",)),
    Rule("ling3", _LING3, ("<arg_key>",)),
    Rule("glm47", marks=("<tool_call>", "<arg_key>")),
    Rule("mimo", _MIMO, ("<tool_call>", "<function=")),
    Rule("step3p5", _STEP35, ("<tool_call>", "<function=")),
    Rule("qwen3_coder", marks=("<tool_call>", "<function=")),
    Rule("granite4", _GRANITE, ("<tool_call>", "</tool_call>")),
    Rule("granite", _GRANITE, ("tool_call",)),
    Rule("ernie45", _ERNIE, ("<tool_call>",)),
    Rule("qwen3_json", _QWEN2 | _QWEN3, ("<tool_call>", "</tool_call>")),
    Rule("hermes", marks=("<tool_call>", "</tool_call>", "arguments"), lacks=("<tool_calls>",)),
)

# Most of these parsers take everything as reasoning until an end marker comes, and only in streams do they look whether
# the prompt had it already. A row for such a parser asks how the template leaves the thinking by default.
REASONING_RULES: Final = (
    Rule("openai_gptoss", frozenset({"gpt_oss"})),
    Rule("deepseek_v3", frozenset({"deepseek_v32"})),
    Rule("deepseek_v4", frozenset({"deepseek_v4"})),
    Rule("deepseek_v41", frozenset({"deepseek_v41"})),
    Rule("kimi_k3", frozenset({"kimi_k3"})),
    Rule("inkling", frozenset({"inkling_mm_model", "inkling_model"})),
    Rule("mistral", _MISTRAL | {"mistral"}, lacks=_ANY_JINJA, names=("magistral", "reasoning")),
    Rule("mistral", marks=("[THINK]",)),
    Rule("gemma4", marks=("<|channel>thought",)),
    Rule("seed_oss", marks=("<seed:think>",)),
    Rule("k2_horizon", marks=("<ifm|think>",)),
    Rule("minimax_m3", marks=("<mm:think>",)),
    Rule("plamo3", marks=("<|plamo:begin_think:plamo|>",)),
    Rule("muse_glimmer", marks=("atem:function_calls", "to=self")),
    Rule("hy_v3", frozenset({"hy_v3"})),
    Rule("hy_v4", frozenset({"hy_v4"})),
    Rule("cohere_command4", _COHERE4, ("<|START_THINKING|>",), package=_MELODY),
    Rule("cohere_command3", marks=("<|START_ACTION|>", "<|START_THINKING|>"), package=_MELODY),
    Rule("granite", _GRANITE, ("Here is my thought process:",)),
    Rule("hunyuan_a13b", frozenset({"hunyuan_v1_moe"}), ("<think>",)),
    Rule("poolside_v1", frozenset({"laguna"}), thinking=_CLOSED),
    Rule("deepseek_v3", marks=(_DEEPSEEK_ASSISTANT, "not thinking"), thinking=_CLOSED),
    Rule("deepseek_r1", marks=(_DEEPSEEK_ASSISTANT,), thinking=_OPEN),
    Rule("deepseek_r1", marks=(_DEEPSEEK_ASSISTANT, "</think>"), names=("deepseek-r1",), thinking=_NOT_CLOSED),
    Rule("kimi_k2", marks=("<|im_middle|>", "<think>"), thinking=_NOT_CLOSED),
    Rule("minimax_m2", marks=("<minimax:tool_call>",), thinking=_OPEN),
    Rule("ling3", _LING3, thinking=_OPEN),
    Rule("glm45", marks=("<tool_call>", "<arg_key>", "<think>"), thinking=_NOT_CLOSED),
    Rule("ernie45", _ERNIE, thinking=_OPEN),
    Rule("step3", frozenset({"step3_vl", "step3_text"}), thinking=_OPEN),
    Rule("step3p5", _STEP35, thinking=_OPEN),
    Rule("mimo", _MIMO, thinking=_OPEN),
    Rule("minicpmv", frozenset({"minicpmv4_6", "minicpmv4_7"}), thinking=_OPEN),
    Rule("granite_thinking_parser", _GRANITE, thinking=_OPEN),
    Rule("nemotron_v3", frozenset({"nemotron_h", "nemotron_h_omni"}), ("<function=",), thinking=_OPEN),
    Rule("olmo3", _OLMO, thinking=_OPEN),
    Rule("holo2", names=("holo2",), thinking=_OPEN),
    Rule("deepseek_r1", _QWEN2, thinking=_OPEN),
    Rule("qwen3", _QWEN3, ("<think>", "enable_thinking"), thinking=_NOT_CLOSED),
    Rule("qwen3", _LFM2, ("<think>",), thinking=_NOT_CLOSED),
    # A template that reads /no_think in a message can close the thinking where no parser sees it.
    Rule("qwen3", lacks=("/no_think",), thinking=_OPEN),
)


def choose_parsers(
    *,
    model_type: str,
    architectures: Sequence[str],
    model_name: str,
    chat_template: str | None,
    installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> ParserChoice:
    """The parsers for a model. None where the format is not known for certain, or the tools never reach the prompt."""
    template = chat_template or ""
    thinking = _default_thinking(template) if template else None
    model = _Model(frozenset({model_type, *architectures}), model_name.lower(), template, thinking, installed)
    tool = next((rule for rule in TOOL_RULES if _holds(rule, model)), None)
    reasoning = next((rule for rule in REASONING_RULES if _holds(rule, model)), None)
    renders_tools = (tool is not None and tool.engine_renders) or _uses_tools(template)
    if not renders_tools:
        tool = None
    return ParserChoice(
        tool_call_parser=tool.parser if tool else None,
        reasoning_parser=reasoning.parser if reasoning else None,
        renders_tools=renders_tools,
        reason=_reason(tool or reasoning, model_type, renders_tools=renders_tools),
    )


def _holds(rule: Rule, model: _Model) -> bool:
    return (
        (not rule.families or not rule.families.isdisjoint(model.families))
        and all(mark in model.template for mark in rule.marks)
        and not any(mark in model.template for mark in rule.lacks)
        and (not rule.names or any(name in model.name for name in rule.names))
        and (not rule.thinking or model.thinking in rule.thinking)
        and (not rule.package or model.installed(rule.package))
    )


def _reason(rule: Rule | None, model_type: str, *, renders_tools: bool) -> str:
    if rule is None:
        return "unknown tool format" if renders_tools else "no tools in the chat template"
    return f"model_type {model_type}" if rule.families else f"template with {', '.join(rule.marks) or '<think>'}"


def _uses_tools(template: str) -> bool:
    """Whether the template reads the variable `tools`."""
    try:
        return "tools" in find_undeclared_variables(_JINJA.parse(_GENERATION_TAG.sub("", template)))
    except TemplateSyntaxError:  # a tag or filter that only the model's own code knows
        code = " ".join(_CODE.findall(_COMMENT.sub("", template)))
        return re.search(r"(?<![\w.])tools\b", _STRING.sub("", code)) is not None


def _default_thinking(template: str) -> Thinking | None:
    """Where the template leaves `<think>` after a plain question. None if it cannot be rendered here."""
    question = {"role": "user", "content": _QUESTION}
    context = {"messages": [question], "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        prompt = _JINJA.from_string(_GENERATION_TAG.sub("", template)).render(context, strftime_now=str)
    except _RENDER_ERRORS:
        return None
    turn = prompt.rpartition(_QUESTION)[2]
    opened, closed = turn.rfind("<think>"), turn.rfind("</think>")
    if opened == closed:
        return "silent"
    return "open" if opened > closed else "closed"
