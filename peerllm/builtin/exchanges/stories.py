"""Stories of two hundred to five hundred tokens: a hero, a thing, trials on the way, a helper, a good end."""

from __future__ import annotations

from random import Random

from peerllm.builtin.exchanges import story_parts as parts

TRIALS_SHORT, TRIALS_PLAIN, TRIALS_LONG = 1, 2, 4

_ASK = (
    "tell me a {l}story about a {hero}", "tell me a {l}story about a {hero} and a {thing}",
    "a {l}story about a {hero}, please", "write a {l}story about a {hero} and a {thing}",
    "tell a {l}story about {name} the {hero}", "can you tell me a {l}story about a {hero}?",
    "I want to hear a {l}story about a {hero} and a {thing}",
    "tell me a {l}story with a {hero}, a {helper} and a {thing}",
)  # fmt: skip
_ASK_ANY = (
    "tell me a {l}story", "tell me a {l}story, please", "a {l}bedtime story, please",
    "can you tell me a {l}story?", "write a {l}story", "I cannot sleep, tell me a {l}story",
    "{l}story time",
)  # fmt: skip


def story(rng: Random) -> tuple[str, str]:
    """A wish for a story and the story; what the wish names is in the story."""
    words = {
        "name": rng.choice(parts.NAMES),
        "hero": rng.choice(parts.HEROES),
        "helper": rng.choice(parts.HELPERS),
        "thing": rng.choice(parts.THINGS),
        "place": rng.choice(parts.PLACES),
        "trait": rng.choice(parts.TRAITS),
        "weather": rng.choice(parts.WEATHERS),
    }
    length, trials = rng.choice(
        (("", TRIALS_PLAIN), ("", TRIALS_PLAIN), ("short ", TRIALS_SHORT), ("long ", TRIALS_LONG))
    )
    asked = rng.choice(_ASK if rng.random() < 0.75 else _ASK_ANY).format(l=length, **words)
    asked = asked[0].upper() + asked[1:] if rng.random() < 0.8 else asked
    if asked[-1] not in "?.":
        asked += rng.choice((".", "", ""))
    body = list(rng.sample(parts.TRIALS, trials))
    body.insert(rng.randint(1, trials), rng.choice(parts.MEETINGS))
    sections = [rng.choice(parts.OPENINGS), rng.choice(parts.LOSSES), *body]
    sections += [rng.choice(parts.ENDINGS), rng.choice(parts.MORALS)]
    text = "\n".join(section.format(**words) for section in sections)
    return asked, _articles(text)


def _articles(text: str) -> str:
    """The text with 'an' before the vowels that a drawn word may begin with."""
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text
