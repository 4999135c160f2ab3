"""Long conversations to replay: generated ones of four kinds, or those of a file in ShareGPT's format.

The generated ones are nonsense of the right lengths, which is all that a prefix cache sees. The same seed gives the
same text. A message's length is lognormal, in words for English and in characters for Chinese, and aims at

    kind            who        median   90th percentile   longest
    chat-en         user           20               110       400
                    assistant     130               360     1,000
    chat-zh         user           20               110       400
                    assistant     150               420     1,000
    counselling-*   user           20                55       200
                    assistant      40                80       300

`chat` has the shape of public chat logs: most questions are a line, a few are pages, and answers are longer. The means
that WildChat's paper gives in tokens (arXiv 2405.01470, table 1) are, for a question and an answer, 70 and 216 in
LMSYS-Chat-1M, 94 and 348 in ShareGPT, and 296 and 441 in WildChat; those of `chat-en` are near the first.
`counselling` is a session that goes on for hundreds of short turns.

How many tokens a Chinese message takes is up to the tokenizer: one made for Chinese needs fewer than one for each
character, that of the embedded model between two and three.
"""

# ruff: noqa: RUF001  # Chinese is written with full-width punctuation

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Message = dict[str, str]

_SIGMAS_TO_P90: Final = 1.2816  # of the normal distribution
_ROLES: Final[Mapping[str, str]] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and the fixed text that later turns show as its answer."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Exchanges under a system prompt."""

    kind: str
    system: str
    exchanges: Sequence[Exchange]

    def messages(self, turn: int, dropped: int = 0, salt: str = "") -> list[Message]:
        """What a client sends to ask question `turn`, without the `dropped` oldest exchanges.

        The salt stands first in the system prompt: prompts with different salts share no cached prefix.
        """
        history = [{"role": "system", "content": f"{salt} {self.system}".strip()}]
        for exchange in self.exchanges[dropped:turn]:
            history.append({"role": "user", "content": exchange.user})
            history.append({"role": "assistant", "content": exchange.assistant})
        return [*history, {"role": "user", "content": self.exchanges[turn].user}]


@dataclass(frozen=True, slots=True)
class _Voice:
    """How one side of a conversation talks. The lengths count words, or characters where `separator` is empty."""

    p50: int
    p90: int
    longest: int
    phrases: Sequence[str]
    separator: str = " "
    stop: str = "."

    def say(self, chance: random.Random) -> str:
        spread = math.log(self.p90 / self.p50) / _SIGMAS_TO_P90
        length = min(self.longest, max(1, round(chance.lognormvariate(math.log(self.p50), spread))))
        said: list[str] = []
        while len(said) < length:
            phrase = chance.choice(self.phrases)
            said += phrase.split() if self.separator else phrase
        return self.separator.join(said[:length]).rstrip(",，") + self.stop


@dataclass(frozen=True, slots=True)
class _Kind:
    system: str
    user: _Voice
    assistant: _Voice


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


_ASKING_EN: Final = _lines("""
please explain how the gates of a harbour keep the water level,
write a short letter to the council about the old bridge,
what is the difference between a lock and a sluice,
my script reads a table of tides and prints the wrong hour,
give me five names for a small boat that sails in winter,
translate this notice for the visitors of the lighthouse,
I have a list of readings from three sensors,
can you make the second paragraph shorter and more friendly,
how would you test a function that sorts dates,
plan two days on the island for a family with a dog,
and then compare both answers in a table,
the error appears only when the file is empty,
""")

_ANSWERING_EN: Final = _lines("""
a gate closes when the tide rises and opens when it falls,
so the basin behind it stays at nearly the same level.
First read the file line by line, and keep the last value you saw.
There are three things to consider here: cost, time and safety.
The letter should name the bridge, the damage and what you ask for,
which makes it easier for the reader to agree.
For example, a sensor near the mouth of the river reports higher values,
because salt water is heavier than fresh water.
In the morning take the ferry, walk to the mill and have lunch there.
Note that the result depends on the season and on the wind,
and that a small mistake in the first step grows with every other.
If you need more detail, I can show the full calculation.
""")

_CLIENT_EN: Final = _lines("""
I slept badly again and woke up at four,
my sister called and I did not know what to say,
at work everybody seems to manage except me,
I tried the walk that you suggested,
it helped a little, but the evening was hard,
sometimes I think that I expect too much of myself,
I do not want to talk about my father today,
maybe I was only tired,
we argued about money and then nobody spoke,
I wrote it down as you said,
yes, that is how it felt,
I am afraid that it starts again,
""")

_COUNSELLOR_EN: Final = _lines("""
thank you for telling me that, it cannot have been easy.
It sounds as if the evenings are the hardest part of your day,
and as if you carry much of it alone.
What went through your mind when she called?
You noticed it and you stayed with it, which is a step.
We do not have to speak of him today, you decide what we look at.
When you say that everybody manages, whom do you think of?
Perhaps we can look at one small thing for tomorrow,
something that takes ten minutes and asks nothing of you.
How would you answer a friend who told you the same?
I hear that you are afraid, and also that you are watchful,
""")

_ASKING_ZH: Final = _lines("""
请解释一下水闸是怎样控制港口水位的，
帮我给市政府写一封关于旧桥的短信，
船闸和水坝有什么区别，
我的程序读取潮汐表以后打印的时间不对，
给一条冬天出海的小船起五个名字，
请把灯塔的参观须知翻译成英文，
我这里有三个传感器的记录，
能不能把第二段写得短一点、亲切一点，
怎样测试一个按日期排序的函数，
帮我们一家人安排两天的海岛行程，
然后把两个答案放进一张表里比较，
文件是空的时候才会出现这个错误，
""")

_ANSWERING_ZH: Final = _lines("""
涨潮的时候闸门关闭，退潮的时候闸门打开，
所以里面的水位几乎保持不变。
首先逐行读取文件，并且记住最后一个数值。
这里需要考虑三个方面：成本、时间和安全。
信里应该写清楚桥的名字、损坏的情况和您的要求，
这样对方更容易同意。
例如靠近河口的传感器读数会高一些，
因为海水比淡水重。
早上可以坐渡船，走到磨坊，在那里吃午饭。
请注意，结果和季节、风向都有关系，
第一步的小错误会在后面越来越大。
如果需要，我可以列出完整的计算过程。
""")

_CLIENT_ZH: Final = _lines("""
昨天晚上又没睡好，四点就醒了，
姐姐打电话来，我不知道说什么，
单位里好像别人都能应付，只有我不行，
你上次说的散步我试过了，
好了一点，可是到了晚上还是难受，
有时候觉得是我对自己要求太高，
今天不太想说我爸爸的事，
也许只是太累了，
我们为钱吵了一架，后来谁也没说话，
我照你说的写下来了，
对，就是这种感觉，
我怕又会重新开始，
""")

_COUNSELLOR_ZH: Final = _lines("""
谢谢你愿意告诉我，说出来并不容易。
听起来晚上是你一天里最难熬的时候，
而且很多事情都是你一个人在承担。
她打电话来的时候，你心里想到了什么？
你察觉到了，也没有逃开，这已经是一步。
今天可以不谈他，谈什么由你来决定。
你说别人都能应付的时候，想到的是谁？
也许我们可以为明天找一件很小的事，
只要十分钟，对你没有任何要求。
如果是朋友这样对你说，你会怎么回答？
我听到了你的害怕，也听到了你的小心，
""")

_KINDS: Final[Mapping[str, _Kind]] = {
    "chat-en": _Kind(
        "You are a helpful assistant. Answer clearly and to the point.",
        _Voice(20, 110, 400, _ASKING_EN, stop="?"),
        _Voice(130, 360, 1000, _ANSWERING_EN),
    ),
    "counselling-zh": _Kind(
        "你是一位耐心的心理咨询师，认真倾听，温和地回应来访者。",
        _Voice(20, 55, 200, _CLIENT_ZH, "", "。"),
        _Voice(40, 80, 300, _COUNSELLOR_ZH, "", "。"),
    ),
    "counselling-en": _Kind(
        "You are a patient counsellor. Listen, ask one question at a time, and never diagnose.",
        _Voice(20, 55, 200, _CLIENT_EN),
        _Voice(40, 80, 300, _COUNSELLOR_EN),
    ),
    "chat-zh": _Kind(
        "你是一个乐于助人的助手，回答要清楚、简洁。",
        _Voice(20, 110, 400, _ASKING_ZH, "", "？"),
        _Voice(150, 420, 1000, _ANSWERING_ZH, "", "。"),
    ),
}
KINDS: Final = tuple(_KINDS)


def generate(kind: str, seed: int, exchanges: int) -> Conversation:
    """A conversation of one of `KINDS`."""
    chance, voices = random.Random(f"{kind} {seed}"), _KINDS[kind]
    said = [Exchange(voices.user.say(chance), voices.assistant.say(chance)) for _ in range(exchanges)]
    return Conversation(kind, voices.system, said)


def read(file: Path) -> Iterator[Conversation]:
    """The conversations of a file, JSON or JSON Lines.

    Each is `{"conversations": [{"from": "human", "value": ...}, ...]}`, or the same under `messages` and with `role`
    and `content`. What stands before the first question, an unanswered question and other roles are left out.
    """
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        records: Iterable[Any] = json.loads(text)
    else:
        records = (json.loads(line) for line in text.splitlines() if line.strip())
    for record in records:
        said = record.get("conversations") or record.get("messages") or ()
        yield _paired([(_ROLES.get(role, ""), text) for role, text in map(_role_and_text, said)])


def _role_and_text(message: Mapping[str, Any]) -> tuple[str, str]:
    return message.get("from") or message.get("role") or "", message.get("value") or message.get("content") or ""


@dataclass(slots=True)
class _Pairing:
    """Collects what is said: who speaks twice in a row has spoken once."""

    system: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    def close(self) -> None:
        if self.asked and self.answered:
            self.exchanges.append(Exchange("\n".join(self.asked), "\n".join(self.answered)))
            self.asked, self.answered = [], []

    def hear(self, role: str, text: str) -> None:
        if role == "user":
            self.close()
            self.asked.append(text)
        elif role == "assistant" and self.asked:
            self.answered.append(text)
        elif role == "system" and not self.asked:
            self.system.append(text)


def _paired(said: Iterable[tuple[str, str]]) -> Conversation:
    pairing = _Pairing()
    for role, text in said:
        if text:
            pairing.hear(role, text)
    pairing.close()
    return Conversation("data", "\n".join(pairing.system), pairing.exchanges)
