"""What the settings of all experiments share: numbers that a preset fills in, and their checks."""

from dataclasses import replace
from typing import Any, TypeVar

T = TypeVar("T")


def filled(config: T, numbers: dict[str, Any]) -> T:
    """A config with `numbers` where it has 0 or nothing."""
    return replace(config, **{name: value for name, value in numbers.items() if not getattr(config, name)})  # pyright: ignore


def check_least(config: Any, least: float, *names: str) -> None:
    """`ValueError` for a number, or one of several, below `least`; None stands for the preset's."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number < least for number in numbers):
            raise ValueError(f"{name} must be at least {least}, not {value}.")
