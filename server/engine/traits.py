"""What a model is, for clients that ask."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traits:
    """Its type in config.json, and whether it generates, shows its reasoning apart, and takes images."""

    model_type: str
    generates: bool
    reasons: bool
    sees: bool
