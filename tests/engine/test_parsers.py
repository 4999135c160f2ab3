"""The parsers that are chosen for a model, on short templates that carry each family's real markers."""

from typing import NamedTuple

import pytest

from server.engine.parsers import REASONING_RULES, TOOL_RULES, ParserChoice, choose_parsers

ALWAYS_THINKS = "<think>\n"
THINKS_UNLESS_TOLD = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
THINKS_WHEN_TOLD = "{% if not enable_thinking %}<think></think>{% endif %}"

JSON_CALL = '<tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>'
XML_CALL = "<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>"
ARG_KEY_CALL = "<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>"
LLAMA_CALL = 'Answer with {"name": NAME, "parameters": dictionary of arguments}.<|start_header_id|>ipython'
PYTHONIC_CALL = "Answer with [func_name1(key=value)]."
DEEPSEEK_CALL = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
DEEPSEEK_TURN = "<\uff5cAssistant\uff5c>"
DEEPSEEK_SWITCH = "{% if not thinking %}</think>{% else %}<think>{% endif %}"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(call: str = "", turn: str = "") -> str:
    """A template that shows the tools with the way to call them, and opens the assistant's turn with `turn`."""
    return (
        "{% if tools %}{{ tools | tojson }}" + call + "{% endif %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: " + turn + "{% endif %}"
    )


def choose(model_type: str = "llama", chat_template: str | None = None, name: str = "a-model") -> ParserChoice:
    architecture = {"bailing_hybrid": "BailingMoeV3ForCausalLM", "mimo_v2": "MiMoV2ForCausalLM"}.get(model_type)
    return choose_parsers(
        model_type=model_type,
        architectures=(architecture,) if architecture else (),
        model_name=name,
        chat_template=chat_template,
        installed=lambda _: True,
    )


class Case(NamedTuple):
    model_type: str
    chat_template: str
    tool_call_parser: str | None
    reasoning_parser: str | None
    name: str = "a-model"


CASES = {
    "Qwen2.5": Case("qwen2", template(JSON_CALL), "qwen3_json", None),
    "QwQ": Case("qwen2", template(JSON_CALL, ALWAYS_THINKS), "qwen3_json", "deepseek_r1"),
    "Qwen3": Case("qwen3", template(JSON_CALL, THINKS_UNLESS_TOLD), "qwen3_json", "qwen3"),
    "Qwen3 Instruct": Case("qwen3_moe", template(JSON_CALL), "qwen3_json", None),
    "Qwen3 Thinking": Case("qwen3_moe", template(JSON_CALL, ALWAYS_THINKS), "qwen3_json", "qwen3"),
    "Qwen3-Coder": Case("qwen3_moe", template(XML_CALL), "qwen3_coder", None),
    "Qwen3.5": Case("qwen3_5", template(XML_CALL, ALWAYS_THINKS), "qwen3_coder", "qwen3"),
    "Hermes": Case("llama", template(JSON_CALL), "hermes", None),
    "Llama 3.1": Case("llama", template(LLAMA_CALL), "llama3_json", None),
    "Llama 3.2 pythonic": Case("llama", template(PYTHONIC_CALL), "pythonic", None),
    "Llama 4": Case("llama4", template(PYTHONIC_CALL), "llama4_pythonic", None),
    "Mistral": Case("mistral", template("[TOOL_CALLS]"), "mistral", None),
    "Ministral Reasoning": Case("mistral3", template("[TOOL_CALLS][ARGS]", "[THINK]"), "mistral", "mistral"),
    "gpt-oss": Case("gpt_oss", template("<|channel|>"), "openai", "openai_gptoss"),
    "DeepSeek V3": Case("deepseek_v3", template(DEEPSEEK_CALL, DEEPSEEK_TURN), "deepseek_v3", None),
    "DeepSeek R1": Case(
        "deepseek_v3", template(DEEPSEEK_CALL, DEEPSEEK_TURN + ALWAYS_THINKS), "deepseek_v3", "deepseek_r1"
    ),
    "DeepSeek R1-0528": Case(
        "deepseek_v3",
        template(DEEPSEEK_CALL + "{% if '</think>' in messages %}{% endif %}", DEEPSEEK_TURN),
        "deepseek_v3",
        "deepseek_r1",
        "models/DeepSeek-R1-0528",
    ),
    "DeepSeek V3.1": Case(
        "deepseek_v3", template(DEEPSEEK_CALL, DEEPSEEK_TURN + DEEPSEEK_SWITCH), "deepseek_v31", "deepseek_v3"
    ),
    "DeepSeek V3.2": Case("deepseek_v32", CHATML, "deepseek_v32", "deepseek_v3"),
    "DeepSeek V4": Case("deepseek_v4", CHATML, "deepseek_v4", "deepseek_v4"),
    "GLM-4.6": Case("glm4_moe", template(ARG_KEY_CALL, THINKS_UNLESS_TOLD), "glm47", "glm45"),
    "GLM-5": Case("glm_moe_dsa", template(ARG_KEY_CALL, ALWAYS_THINKS), "glm47", "glm45"),
    "Ling 3": Case("bailing_hybrid", template(ARG_KEY_CALL, ALWAYS_THINKS), "ling3", "ling3"),
    "Laguna": Case("laguna", template(ARG_KEY_CALL, THINKS_WHEN_TOLD), "poolside_v1", "poolside_v1"),
    "Kimi K2": Case("kimi_k2", template("<|tool_calls_section_begin|>", "<|im_middle|>"), "kimi_k2", None),
    "Kimi K2 Thinking": Case(
        "kimi_k2", template("<|tool_calls_section_begin|><think></think>", "<|im_middle|>"), "kimi_k2", "kimi_k2"
    ),
    "Kimi K3": Case("kimi_k3", CHATML, "kimi_k3", "kimi_k3"),
    "MiniMax M2": Case("minimax_m2", template("<minimax:tool_call>", ALWAYS_THINKS), "minimax_m2", "minimax_m2"),
    "MiniMax M3": Case("minimax_m3_vl", template("]<]minimax[>[<tool_call><mm:think>"), "minimax_m3", "minimax_m3"),
    "Gemma 3": Case("gemma3", CHATML, None, None),
    "Gemma 4": Case("gemma4", template("<|tool_call>call:NAME{", "<|channel>thought\n<channel|>"), "gemma4", "gemma4"),
    "FunctionGemma": Case("gemma3_text", template("<start_function_call>call:NAME{"), "functiongemma", None),
    "Granite 3": Case(
        "granite",
        template("<|tool_call|>{% if thinking %}Here is my thought process:{% endif %}"),
        "granite",
        "granite",
    ),
    "Granite 4": Case("granitemoehybrid", template(JSON_CALL), "granite4", None),
    "Granite 4.2": Case("granite", template(XML_CALL, ALWAYS_THINKS), "qwen3_coder", "granite_thinking_parser"),
    "Granite 20B": Case("gpt_bigcode", template("<|function_call_library|><function_call>"), "granite-20b-fc", None),
    "Phi-4-mini": Case("phi3", template('functools[{"name": NAME}]'), "phi4_mini_json", None),
    "Command A": Case(
        "cohere2", template("<|START_ACTION|>", "<|START_THINKING|>"), "cohere_command3", "cohere_command3"
    ),
    "ERNIE 4.5 Thinking": Case("ernie4_5_moe", template(JSON_CALL, ALWAYS_THINKS), "ernie45", "ernie45"),
    "Hunyuan A13B": Case(
        "hunyuan_v1_moe",
        template('<tool_calls>[{"name": NAME}]</tool_calls>', THINKS_UNLESS_TOLD),
        "hunyuan_a13b",
        "hunyuan_a13b",
    ),
    "Hy3": Case("hy_v3", template("<tool_calls:opensource>"), "hy_v3", "hy_v3"),
    "Seed-OSS": Case("seed_oss", template("<seed:think><seed:tool_call><function=NAME>"), "seed_oss", "seed_oss"),
    "Step 3": Case("step3_vl", template('<steptml:invoke name="NAME">', ALWAYS_THINKS), "step3", "step3"),
    "Step 3.5": Case("step3p5", template(XML_CALL, ALWAYS_THINKS), "step3p5", "step3p5"),
    "MiMo V2.5": Case("mimo_v2", template(XML_CALL, ALWAYS_THINKS), "mimo", "mimo"),
    "Nemotron 3": Case("nemotron_h", template(XML_CALL, ALWAYS_THINKS), "qwen3_coder", "nemotron_v3"),
    "MiniCPM-V Thinking": Case("minicpmv4_6", template(XML_CALL, ALWAYS_THINKS), "qwen3_coder", "minicpmv"),
    "MiniCPM5": Case("llama", template('<function name="NAME"><param name="KEY">'), "minicpm5", None),
    "Olmo 3": Case("olmo3", template("<function_calls></function_calls>", ALWAYS_THINKS), "olmo3", "olmo3"),
    "InternLM": Case("internlm2", template("<|action_start|><|plugin|>"), "internlm", None),
    "Jamba": Case("jamba", template("<tool_calls></tool_calls>"), "jamba", None),
    "LFM2": Case("lfm2", template("<|tool_list_start|>"), "lfm2", None),
    "LFM2.5": Case("lfm2_moe", template("<think></think>"), "lfm2", "qwen3"),
    "xLAM": Case("qwen2", template("make calls in a single JSON array"), "xlam", None),
    "Apertus": Case("apertus", template("<|tools_prefix|>[]<|tools_suffix|>"), "apertus", None),
    "LongCat": Case("longcat_flash", template("<longcat_tool_call></longcat_tool_call>"), "longcat", None),
    "GigaChat 3": Case("deepseek_v3", template("{% set function_call = '<|role_sep|>' %}"), "gigachat3", None),
    "K2 Horizon": Case("k2_horizon", template("<ifm|tool_call>", "<ifm|think>"), "k2_horizon", "k2_horizon"),
    "Dots": Case("dots3_note", template("<dots_function_call>", ALWAYS_THINKS), "dots", "qwen3"),
    "Muse Glimmer": Case("muse_glimmer", template("<atem:function_calls> to=self"), "muse_glimmer", "muse_glimmer"),
    "Holo2": Case("qwen3_vl", template(JSON_CALL, ALWAYS_THINKS), "qwen3_json", "holo2", "Hcompany/Holo2-8B"),
}


@pytest.mark.parametrize("family", CASES)
def test_a_family_gets_the_parsers_of_its_format(family: str) -> None:
    case = CASES[family]
    choice = choose(case.model_type, case.chat_template, case.name)
    assert (choice.tool_call_parser, choice.reasoning_parser) == (case.tool_call_parser, case.reasoning_parser)


def test_a_llama_with_a_bare_chatml_template_gets_nothing() -> None:
    assert choose("llama", CHATML) == ParserChoice(None, None, False, "no tools in the chat template")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "glm4_moe", "granite"])
def test_a_model_without_a_template_gets_nothing(model_type: str) -> None:
    assert choose(model_type, None) == ParserChoice(None, None, False, "no tools in the chat template")


@pytest.mark.parametrize(
    ("model_type", "name", "parser"),
    [
        ("gpt_oss", "gpt-oss-20b", "openai"),
        ("deepseek_v32", "a-model", "deepseek_v32"),
        ("mistral3", "a-model", "mistral"),
        ("mistral", "mistralai/Devstral-Small-2505", "mistral"),
    ],
)
def test_a_family_that_vllm_renders_itself_needs_no_template(model_type: str, name: str, parser: str) -> None:
    choice = choose(model_type, None, name)
    assert choice.tool_call_parser == parser
    assert choice.renders_tools


def test_a_mistral_with_a_template_of_another_format_is_read_by_its_template() -> None:
    assert choose("mistral3", template(JSON_CALL)).tool_call_parser == "hermes"
    assert choose("mistral3", CHATML) == ParserChoice(None, None, False, "no tools in the chat template")


def test_only_a_mistral_named_as_a_reasoner_reasons_without_a_template() -> None:
    assert choose("mistral", None, "mistralai/Magistral-Small-2506").reasoning_parser == "mistral"
    assert choose("mistral", None, "mistralai/Devstral-Small-2505").reasoning_parser is None


def test_a_fine_tune_of_an_unknown_family_is_known_by_its_template() -> None:
    choice = choose("something_new", template(JSON_CALL, ALWAYS_THINKS))
    assert choice == ParserChoice("hermes", "qwen3", True, "template with <tool_call>, </tool_call>, arguments")


def test_tools_in_an_unknown_format_are_rendered_but_not_parsed() -> None:
    assert choose("llama", template("CALL NAME")) == ParserChoice(None, None, True, "unknown tool format")


def test_markers_in_a_template_that_shows_no_tools_give_no_tool_parser() -> None:
    distilled = CHATML + DEEPSEEK_CALL + DEEPSEEK_TURN + ALWAYS_THINKS
    choice = choose("llama", distilled)
    assert (choice.tool_call_parser, choice.reasoning_parser) == (None, "deepseek_r1")
    assert not choice.renders_tools


def test_a_parser_that_needs_a_package_is_not_chosen_without_it() -> None:
    choice = choose_parsers(
        model_type="cohere2",
        architectures=["Cohere2ForCausalLM"],
        model_name="command-a",
        chat_template=template("<|START_ACTION|>", "<|START_THINKING|>"),
        installed=lambda package: package != "cohere_melody",
    )
    assert (choice.tool_call_parser, choice.reasoning_parser) == (None, None)


@pytest.mark.parametrize("model_type", ["qwen3", "glm4_moe", "nemotron_h", "step3p5", "exaone4"])
def test_a_model_that_thinks_only_when_told_gets_no_parser_that_would_swallow_its_answers(model_type: str) -> None:
    assert choose(model_type, template(XML_CALL, THINKS_WHEN_TOLD)).reasoning_parser is None


def test_think_markers_in_the_instructions_alone_give_no_reasoning_parser() -> None:
    assert choose("llama", template("Put your plan in <think></think>." + JSON_CALL)).reasoning_parser is None


def test_a_template_that_obeys_no_think_in_a_message_gets_no_generic_reasoning_parser() -> None:
    switch = "{% if '/no_think' in messages[0].content %}<think></think>{% else %}<think>{% endif %}"
    assert choose("something_new", template(JSON_CALL, switch)).reasoning_parser is None


def test_a_template_that_cannot_be_rendered_gets_no_reasoning_parser_by_its_prompt() -> None:
    refuses = "{{ raise_exception('images only') }}" + template(JSON_CALL, ALWAYS_THINKS)
    assert choose("qwen3", refuses).reasoning_parser is None


@pytest.mark.parametrize(
    "chat_template",
    [
        CHATML + "{# tools are not shown #}",
        CHATML + "You have no tools.",
        CHATML + "{{ 'no tools' }}",
        CHATML + "{% for message in messages %}{{ message.tools }}{% endfor %}",
        CHATML + "{% set tools = [] %}{% for tool in tools %}{{ tool }}{% endfor %}",
        "{{ messages | of_my_own }}{# tools #} tools {{ 'tools' }} {{ message.tools }} {{ my_tools }}",
    ],
)
def test_a_template_that_only_speaks_of_tools_does_not_render_them(chat_template: str) -> None:
    assert not choose("llama", chat_template).renders_tools


@pytest.mark.parametrize(
    "chat_template",
    [
        CHATML + "{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}",
        CHATML + "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}",
        CHATML + "{% generation %}{{ tools }}{% endgeneration %}",
        CHATML + "{% of_my_own %}it's{% for tool in tools %}{{ tool }}{% endfor %}",
        CHATML + "{{ tools | of_my_own }}",
    ],
)
def test_a_template_that_reads_the_variable_renders_tools(chat_template: str) -> None:
    assert choose("llama", chat_template).renders_tools


@pytest.mark.engine
def test_every_parser_and_family_in_the_tables_is_known_to_vllm() -> None:
    from transformers import CONFIG_MAPPING
    from vllm.model_executor.models import ModelRegistry
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    families = {family for rule in (*TOOL_RULES, *REASONING_RULES) for family in rule.families}
    assert {rule.parser for rule in TOOL_RULES} <= set(ToolParserManager.list_registered())
    assert {rule.parser for rule in REASONING_RULES} <= set(ReasoningParserManager.list_registered())
    assert families <= {*CONFIG_MAPPING, *_CONFIG_REGISTRY, *ModelRegistry.get_supported_archs()}
