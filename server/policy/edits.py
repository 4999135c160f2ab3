"""What was changed in a request to make it fit, in the words the client is told."""

from dataclasses import dataclass
from typing import Final

AppliedEdit = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Edits:
    """Messages and tokens left out of the prompt, and the answer's cap as (asked for, granted) where it was lowered."""

    dropped_messages: int = 0
    dropped_tokens: int = 0
    max_tokens: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.dropped_messages or self.dropped_tokens or self.max_tokens)

    def __add__(self, other: "Edits") -> "Edits":
        """Both, for a call of several conversations."""
        return Edits(
            self.dropped_messages + other.dropped_messages,
            self.dropped_tokens + other.dropped_tokens,
            other.max_tokens or self.max_tokens,
        )

    def header(self) -> str | None:
        """The value of `x-context-truncated`, or None when nothing was left out."""
        if not self.dropped_messages and not self.dropped_tokens:
            return None
        return f"messages={self.dropped_messages}, tokens={self.dropped_tokens}"

    def applied(self) -> list[AppliedEdit]:
        """The list `context_management.applied_edits`; a plain prompt loses tokens, not turns."""
        edits: list[AppliedEdit] = []
        if self.dropped_messages:
            counts: AppliedEdit = {"dropped_messages": self.dropped_messages, "dropped_tokens": self.dropped_tokens}
            edits.append({"type": "drop_turns", **counts})
        elif self.dropped_tokens:
            edits.append({"type": "drop_tokens", "dropped_tokens": self.dropped_tokens})
        if self.max_tokens:
            edits.append({"type": "clamp_max_tokens", "from": self.max_tokens[0], "to": self.max_tokens[1]})
        return edits


NO_EDITS: Final = Edits()
