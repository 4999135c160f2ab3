"""What a soak asks: what clients of a shared server do in a day, the wrong things included, from a seed."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal

from benchmarks.contenders import MODEL_NAME
from benchmarks.load import WORDS

Kind = Literal["stream", "answer", "other API", "long chat", "leaver", "limited", "stranger", "broken"]

CHAT_PATH: Final = "/v1/chat/completions"
_OUTCOMES: Final[dict[Kind, frozenset[str]]] = {
    "stream": frozenset({"answered"}),
    "answer": frozenset({"answered"}),
    "other API": frozenset({"answered"}),
    "long chat": frozenset({"answered"}),
    "leaver": frozenset({"left"}),
    "limited": frozenset({"answered", "429"}),
    "stranger": frozenset({"401", "429", "503"}),  # 503: Redis took too long to say whose key it is
    "broken": frozenset({"400"}),
}
_SHARES: Final[dict[Kind, float]] = {
    "stream": 0.40, "answer": 0.22, "other API": 0.08, "long chat": 0.05, "leaver": 0.10, "limited": 0.10,
    "stranger": 0.02, "broken": 0.03,
}  # fmt: skip
_TENANTS: Final = ("search", "support", "writers", "batch-jobs")
_LIMITED: Final = "limited"
_END_USERS: Final = 1000
_LONG_CHATS: Final = 500
_FIRST_EXCHANGES: Final = 25  # past a window of 2,048 tokens
_MESSAGE_WORDS: Final = 40
_TOO_LONG_TO_WAIT_FOR: Final = 1500
_FRAMES_READ: Final = 5
_WITH_TOOLS: Final = 0.1  # their streams take another way through the server than plain text
_TOOLS: Final = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `frames` is how many frames a client reads before it leaves; None: all of them."""

    kind: Kind
    path: str
    key: str
    body: dict[str, Any]
    frames: int | None = None

    @property
    def expected(self) -> frozenset[str]:
        """What may become of it: `answered`, `left`, or the status of a refusal."""
        return _OUTCOMES[self.kind]


def asks(requests: int, seed: int = 0) -> Iterator[Ask]:
    """So many requests; the same seed gives the same ones."""
    chance = random.Random(seed)
    kinds, weights = list(_SHARES), list(accumulate(_SHARES.values()))
    visits = [0] * _LONG_CHATS
    for number in range(requests):
        kind = chance.choices(kinds, cum_weights=weights)[0]
        if kind == "long chat":
            chat = number % _LONG_CHATS
            visits[chat] += 1
            yield _chat(chance, kind, messages=_long_chat(chat, visits[chat]))
        else:
            yield _ask(chance, kind, number)


def tenants_file() -> str:
    """The tenants who ask, as the server's tenants file declares them."""
    declared = [_declared(name, "") for name in _TENANTS]
    end_users = "trusted = true\nend_user_limits = { requests_per_minute = 100_000 }\n"
    return "\n".join([*declared, _declared(_LIMITED, f"limits = {{ requests_per_minute = 60 }}\n{end_users}")])


def _declared(name: str, more: str) -> str:
    digest = hashlib.sha256(_key(name).encode()).hexdigest()
    return f'[tenants.{name}]\nkeys = [{{ sha256 = "{digest}" }}]\n{more}'


def _key(tenant: str) -> str:
    return f"tg-soak-{tenant}-0123456789abcdef"


def _ask(chance: random.Random, kind: Kind, number: int) -> Ask:
    match kind:
        case "leaver":
            frames = chance.choice((0, 1, _FRAMES_READ))
            return _chat(chance, kind, max_tokens=_TOO_LONG_TO_WAIT_FOR, frames=frames)
        case "answer":
            return _chat(chance, kind, stream=False)
        case "limited":
            return _chat(chance, kind, tenant=_LIMITED, user=f"user-{number % _END_USERS}")
        case "stranger":
            return _chat(chance, kind, tenant=f"nobody-{number}")
        case "broken":
            wrong: dict[str, Any] = chance.choice(({"max_tokens": -1}, {"messages": "text"}, {"temperature": "hot"}))
            return _chat(chance, kind, **wrong)
        case "other API":
            path, body = chance.choice(_other_bodies(_text(chance)))
            return Ask(kind, path, _key(chance.choice(_TENANTS)), {"model": MODEL_NAME, **body})
    tools: dict[str, Any] = {"tools": _TOOLS} if chance.random() < _WITH_TOOLS else {}
    return _chat(chance, kind, **tools)


def _other_bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    messages = [{"role": "user", "content": text}]
    return [
        ("/v1/completions", {"prompt": text, "max_tokens": 16}),
        ("/v1/responses", {"input": text, "max_output_tokens": 16}),
        ("/v1/messages", {"messages": messages, "max_tokens": 16}),
        ("/api/chat", {"messages": messages, "stream": False, "options": {"num_predict": 16}}),
    ]


def _chat(
    chance: random.Random, kind: Kind, *, tenant: str | None = None, frames: int | None = None, **given: Any
) -> Ask:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": _text(chance)}],
        "max_tokens": chance.randint(4, 32),
        "ignore_eos": True,
        "stream": True,
        **given,
    }
    return Ask(kind, CHAT_PATH, _key(tenant or chance.choice(_TENANTS)), body, frames)


def _long_chat(chat: int, visit: int) -> list[dict[str, str]]:
    """A conversation that is an exchange longer each time it comes back."""
    chance = random.Random(-1 - chat)
    count = 2 * (_FIRST_EXCHANGES + visit) + 1
    return [{"role": ("user", "assistant")[i % 2], "content": _text(chance)} for i in range(count)]


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=_MESSAGE_WORDS))
