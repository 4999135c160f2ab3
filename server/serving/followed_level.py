"""The ladder's level in a front-end that is not the first process, which watches it for all of them."""

from server.policy.ladder import Level, with_engine_state
from server.serving.engine_slot import EngineSlot


class FollowedLevel:
    """The level that the first process last told. Whether there is an engine is seen here."""

    def __init__(self, slot: EngineSlot, *, has_fallback: bool) -> None:
        self._slot = slot
        self._chosen = Level.NORMAL
        self._by_hand = False
        self.has_fallback = has_fallback

    @property
    def chosen(self) -> Level:
        """The level by pin or pressure, whatever the engine does."""
        return self._chosen

    @property
    def chosen_by_hand(self) -> bool:
        """Whether a pin holds."""
        return self._by_hand

    @property
    def level(self) -> Level:
        """The level that counts."""
        return with_engine_state(self._chosen, engine_down=self._slot.down, has_fallback=self.has_fallback)

    def follow(self, chosen: int, *, by_hand: bool) -> None:
        """The first process says what holds now."""
        self._chosen, self._by_hand = Level(chosen), by_hand
