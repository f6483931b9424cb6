"""A decoded JSON value that knows its path, so that an error names the key."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.errors import BadInputError

MAX_TEXT = 200  # characters of a name
MAX_SHOWN = 80  # characters of somebody else's text in a message


class ScenarioError(BadInputError):
    """The scenario is malformed, or lacks what the strategy needs; the text starts with the key's path."""


def shown(value: object) -> str:
    """A value as a message shows it: short, in plain characters."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return ascii(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "...")
        case int() if value.bit_length() > 64:
            return "a number that large"
        case int() | float():
            return repr(value)
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class JsonValue:
    """One value of the file. Every reader raises ScenarioError if the value is not what it asks for."""

    path: str
    value: object

    def wrong(self, what: str) -> ScenarioError:
        return ScenarioError(f"{self.path or 'the scenario'} {what}")

    def mapping(self) -> dict[str, JsonValue]:
        """Every key of an object."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"must be an object, not {shown(self.value)}")
        start = f"{self.path}." if self.path else ""
        found = {}
        for key, value in self.value.items():
            plain = isinstance(key, str) and key.isprintable() and len(key) <= MAX_SHOWN
            found[str(key)] = JsonValue(start + (key if plain else shown(key)), value)
        return found

    def get(self, key: str, default: object = None) -> JsonValue:
        """The key of an object, or `default` where it is missing."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"must be an object, not {shown(self.value)}")
        return JsonValue(f"{self.path}.{key}" if self.path else key, self.value.get(key, default))

    def __getitem__(self, key: str) -> JsonValue:
        found = self.get(key)
        if key not in self.value:  # type: ignore[operator]  # an object: get() says so
            raise found.wrong("is missing")
        return found

    def items(self, least: int, most: int) -> list[JsonValue]:
        """The members of a list."""
        if not isinstance(self.value, list):
            raise self.wrong(f"must be a list, not {shown(self.value)}")
        if not least <= len(self.value) <= most:
            raise self.wrong(f"must have {least} to {most} members, not {len(self.value)}")
        return [JsonValue(f"{self.path}[{place}]", value) for place, value in enumerate(self.value)]

    def text(self) -> str:
        """A string of 1 to MAX_TEXT characters that UTF-8 can write."""
        if not isinstance(self.value, str):
            raise self.wrong(f"must be a string, not {shown(self.value)}")
        if not 1 <= len(self.value) <= MAX_TEXT:
            raise self.wrong(f"must have 1 to {MAX_TEXT} characters, not {len(self.value)}")
        if any("\ud800" <= char <= "\udfff" for char in self.value):
            raise self.wrong(f"must be valid text, not {shown(self.value)}")
        return self.value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong(f"must be true or false, not {shown(self.value)}")
        return self.value

    def whole(self, least: int, most: int) -> int:
        """A whole number, written as 1000 or 1e3."""
        value = self.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(f"must be a whole number from {least} to {most}, not {shown(self.value)}")
        return value

    def number(self, least: float, most: float) -> float:
        """A number; NaN is refused."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(f"must be a number from {least:g} to {most:g}, not {shown(value)}")
        return float(value)
