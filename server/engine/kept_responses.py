"""vLLM's store of responses, kept apart by owner.

vLLM finds a stored response by its id alone, and lets a client choose that id. Here every owner has ids of their own:
what another one keeps is not there, can neither be read nor ended nor written over, and is answered in vLLM's words for
an id that nobody has.
"""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Final, TypeVar

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

Kept = TypeVar("Kept")

# The responses, their messages, the events of streams in the background, and the tasks that generate there.
STORES: Final = ("response_store", "msg_store", "event_store", "background_tasks")


class OwnStore(MutableMapping[str, Kept]):
    """A dict in which whoever asks finds their own entries. `owner` says who that is, at every call."""

    def __init__(self, owner: Callable[[], str]) -> None:
        self._owner = owner
        self._by_owner: dict[str, dict[str, Kept]] = {}

    def __getitem__(self, response_id: str) -> Kept:
        return self._own()[response_id]

    def __setitem__(self, response_id: str, kept: Kept) -> None:
        self._by_owner.setdefault(self._owner(), {})[response_id] = kept

    def __delitem__(self, response_id: str) -> None:
        del self._own()[response_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own())

    def __len__(self) -> int:
        return len(self._own())

    def _own(self) -> dict[str, Kept]:
        return self._by_owner.get(self._owner(), {})


def keep_apart(responses: OpenAIServingResponses | None, owner: Callable[[], str]) -> None:
    """Give vLLM's serving object, if the model has one, stores that know whose call it is. They end with it."""
    if responses is not None:
        for name in STORES:
            setattr(responses, name, OwnStore(owner))
