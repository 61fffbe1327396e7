"""Prompts like RULER's, of invented text, for any tokenizer and length: needles, variables and common words.

The tasks are RULER's; sentences, keys and words are made up here, so figures are not comparable with those of RULER's
own prompts. A prompt follows from task, length, seed and tokenizer alone.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (2024), section 3.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from cachegen.errors import ConfigError

CountTokens = Callable[[str], int]
"""How many tokens a text has, with those that the tokenizer puts around it."""

NUM_KEYS = 4
"""Keys of `niah_multikey`, one of which is asked for."""
NUM_VALUES = 4
"""Values of the one key of `niah_multivalue`."""
NUM_CHAINS = 2
"""Chains of `vt`, one of which is asked for."""
NUM_HOPS = 4
"""Assignments of a chain after its first."""
NUM_COMMON_WORDS = 10
COMMON_WORD_COUNT = 30
RARE_WORD_COUNT = 3
"""How often a word of `cwe` occurs: ten words often, all others rarely."""

# More than any length that is asked for: the search for the right number ends there.
_MAX_UNITS = 1 << 20

_ADJECTIVES = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lofty",
    "mellow", "narrow", "oaken", "patient", "quiet", "rustic", "silver", "tidy", "upright", "velvet", "wooden",
    "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "barrel", "candle", "door", "engine", "fence", "garden", "hammer", "island", "jacket", "kettle",
    "lantern", "mirror", "needle", "orchard", "pillow", "quilt", "river", "saddle", "table", "umbrella",
    "village", "window", "yard",
)  # fmt: skip
_VERBS = (
    "carried", "covered", "crossed", "followed", "guarded", "hid", "held", "left", "lifted", "met", "moved",
    "painted", "passed", "pushed", "reached", "remembered", "sheltered", "touched", "turned", "watched",
)  # fmt: skip
_TIMES = (
    "After the rain", "At noon", "Before supper", "By the evening", "During the fair", "Each morning",
    "In early spring", "Late in the year", "Long ago", "On the last day", "Once a week", "That same night",
    "Toward autumn", "Years later",
)  # fmt: skip
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class RulerRecord:
    """A line of a file of RULER's schema.

    Attributes:
        index: of the record in its file.
        input: the prompt, without the begin of the answer.
        outputs: what the answer must contain.
        length: tokens of `input` and `answer_prefix`.
        answer_prefix: the begin of the answer, which follows the prompt.
    """

    index: int
    input: str
    outputs: tuple[str, ...]
    length: int
    answer_prefix: str


@dataclass(frozen=True)
class _Draft:
    """A prompt that grows with the number of its units, sentences or words; the rest of it stays.

    Attributes:
        render: returns the prompt for a number of units.
        outputs: as in the record.
        answer_prefix: as in the record.
    """

    render: Callable[[int], str]
    outputs: tuple[str, ...]
    answer_prefix: str


def make_records(
    task: str, num_tokens: int, num_records: int, seed: int, count_tokens: CountTokens
) -> list[RulerRecord]:
    """Make the records of a file.

    Args:
        task: a name of `TASKS`.
        num_tokens: of a prompt with the begin of its answer, at most; prompts come within a sentence or a word of it.
        num_records: how many.
        seed: the same seed gives the same records; another task or record draws others.
        count_tokens: says how long a text is.

    Raises:
        ConfigError: a prompt of this task does not fit into so few tokens.
    """
    return [_make_record(task, num_tokens, index, seed, count_tokens) for index in range(num_records)]


def pack_records(records: Sequence[RulerRecord]) -> bytes:
    """Return the records as JSON Lines."""
    return "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()


def _make_record(task: str, num_tokens: int, index: int, seed: int, count_tokens: CountTokens) -> RulerRecord:
    draft = TASKS[task](f"{task} {seed} {index}")

    def count(num_units: int) -> int:
        return count_tokens(draft.render(num_units) + draft.answer_prefix)

    smallest = count(0)
    if smallest > num_tokens:
        raise ConfigError(f"`num_tokens` must be at least {smallest} for task {task}, got {num_tokens}")
    fits, too_many = 0, 1
    while too_many <= _MAX_UNITS and count(too_many) <= num_tokens:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count(middle) <= num_tokens:
            fits = middle
        else:
            too_many = middle
    return RulerRecord(index, draft.render(fits), draft.outputs, count(fits), draft.answer_prefix)


# --- needles and variables among sentences ----------------------------------------------------------------------------


def _make_single(name: str) -> _Draft:
    return _make_needles(name, num_keys=1, num_values=1)


def _make_multikey(name: str) -> _Draft:
    return _make_needles(name, num_keys=NUM_KEYS, num_values=1)


def _make_multivalue(name: str) -> _Draft:
    return _make_needles(name, num_keys=1, num_values=NUM_VALUES)


def _make_needles(name: str, num_keys: int, num_values: int) -> _Draft:
    rng = random.Random(name)
    pairs = zip(rng.sample(_ADJECTIVES, num_keys), rng.sample(_NOUNS, num_keys), strict=True)
    keys = [f"{adjective}-{noun}" for adjective, noun in pairs]
    values = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), num_keys * num_values)]
    values_of = {key: tuple(values[i::num_keys]) for i, key in enumerate(keys)}
    needles = [f"One of the secret numbers for {key} is {value}." for key in keys for value in values_of[key]]
    rng.shuffle(needles)
    what, verb = ("number", "is") if num_values == 1 else ("numbers", "are")
    return _among_sentences(
        name,
        f"Secret numbers are hidden in the text below. Remember them: you will be asked for the {what} of one key.",
        needles,
        f"What {verb} the secret {what} for {keys[0]} in the text above?",
        values_of[keys[0]],
        f" The secret {what} for {keys[0]} in the text {verb}",
    )


def _make_variables(name: str) -> _Draft:
    rng = random.Random(name)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    drawn: dict[str, None] = {}
    while len(drawn) < NUM_CHAINS * (NUM_HOPS + 1):  # of one length: none contains another
        drawn["".join(rng.choices(letters, k=5))] = None
    names = list(drawn)
    values = rng.sample(range(10_000, 100_000), NUM_CHAINS)
    chains = []
    for i, value in enumerate(values):
        chain = names[i::NUM_CHAINS]
        sources = [str(value), *(f"VAR {source}" for source in chain)]
        chains.append([f"VAR {target} = {source}." for target, source in zip(chain, sources, strict=False)])
    # Assignments of a chain stay in order, those of several chains are mixed.
    order = [i for i in range(NUM_CHAINS) for _ in range(NUM_HOPS + 1)]
    rng.shuffle(order)
    lines = [chains[i].pop(0) for i in order]
    return _among_sentences(
        name,
        "Follow the assignments of variables that are hidden in the text below.",
        lines,
        f"Which {NUM_HOPS + 1} variables have the value {values[0]} in the text above, directly or through others?",
        tuple(names[::NUM_CHAINS]),
        f" The variables that have the value {values[0]} are:",
    )


def _among_sentences(
    name: str, head: str, lines: Sequence[str], question: str, outputs: tuple[str, ...], answer_prefix: str
) -> _Draft:
    """Spread lines over a text of so many sentences, in their order, at depths that do not change with its length."""
    rng = random.Random(f"{name} text")
    depths = sorted(rng.random() for _ in lines)
    sentences: list[str] = []

    def render(num_units: int) -> str:
        while len(sentences) < num_units:
            sentences.append(_make_sentence(rng))
        parts = sentences[:num_units]
        for depth, line in reversed(list(zip(depths, lines, strict=True))):
            parts.insert(int(depth * (num_units + 1)), line)
        return f"{head}\n\n{' '.join(parts)}\n\n{question}"

    return _Draft(render, outputs, answer_prefix)


def _make_sentence(rng: random.Random) -> str:
    first, second, third = rng.sample(_NOUNS, 3)
    adjectives = rng.sample(_ADJECTIVES, 2)
    place = rng.choice(("behind", "beside", "beyond", "near", "under"))
    what = f"the {adjectives[0]} {first} {rng.choice(_VERBS)} the {second}"
    return f"{rng.choice(_TIMES)} {what} {place} the {adjectives[1]} {third}."


# --- common words -----------------------------------------------------------------------------------------------------


def _make_common_words(name: str) -> _Draft:
    rng = random.Random(name)
    words: dict[str, None] = {}
    while len(words) < NUM_COMMON_WORDS:
        words[_make_word(rng)] = None
    common = tuple(words)

    def render(num_units: int) -> str:
        while len(words) < NUM_COMMON_WORDS + num_units:
            words[_make_word(rng)] = None
        rare = list(words)[NUM_COMMON_WORDS : NUM_COMMON_WORDS + num_units]
        listed = [*common] * COMMON_WORD_COUNT + rare * RARE_WORD_COUNT
        random.Random(f"{name} {num_units}").shuffle(listed)
        lines = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
        return (
            f"Below is a numbered list of words. A few of them occur often, the others rarely.\n\n{lines}\n\n"
            f"Which are the {NUM_COMMON_WORDS} words that occur most often in the list above?"
        )

    return _Draft(render, common, f" The {NUM_COMMON_WORDS} words that occur most often in the list are:")


def _make_word(rng: random.Random) -> str:
    """Return an invented word of three syllables; all have the same length, so that none contains another."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))


TASKS: Mapping[str, Callable[[str], _Draft]] = {
    "niah_single": _make_single,
    "niah_multikey": _make_multikey,
    "niah_multivalue": _make_multivalue,
    "vt": _make_variables,
    "cwe": _make_common_words,
}
"""Makes the draft of a task from a name that seeds it."""
