# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A synthetic chat corpus from small template grammars, the same for the same seed.

It stands for a user's own data: the demonstration must run where nothing can be downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Turn = dict[str, str]
Exchange = tuple[str, str]

NAMES = [
    "Tim",
    "Ana",
    "Leo",
    "Mia",
    "Sam",
    "Zoe",
    "Ben",
    "Ivy",
    "Max",
    "Eva",
    "Tom",
    "Lily",
    "Jack",
    "Nora",
    "Hugo",
    "Rosa",
]
ANIMALS = ["fox", "owl", "cat", "dog", "bear", "frog", "hen", "goat", "duck", "wolf", "mouse", "crow"]
PLACES = ["forest", "river", "village", "castle", "garden", "market", "harbor", "mountain", "library", "meadow"]
THINGS = ["lamp", "key", "map", "coin", "book", "rope", "apple", "bell", "boat", "mirror"]
QUALITIES = ["small", "brave", "quiet", "clever", "tired", "happy", "curious", "gentle", "old", "proud"]
COUNTRIES = {
    "France": ("Paris", "Europe"),
    "Japan": ("Tokyo", "Asia"),
    "Italy": ("Rome", "Europe"),
    "Spain": ("Madrid", "Europe"),
    "Egypt": ("Cairo", "Africa"),
    "Peru": ("Lima", "South America"),
    "Kenya": ("Nairobi", "Africa"),
    "Norway": ("Oslo", "Europe"),
    "Greece": ("Athens", "Europe"),
    "Cuba": ("Havana", "North America"),
    "Chile": ("Santiago", "South America"),
    "Iran": ("Tehran", "Asia"),
    "India": ("New Delhi", "Asia"),
    "China": ("Beijing", "Asia"),
    "Canada": ("Ottawa", "North America"),
    "Poland": ("Warsaw", "Europe"),
}


def addition(rng: random.Random) -> Exchange:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    question = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"Please compute {a} plus {b} step by step."])
    note = f"Write down {ones % 10} and carry 1." if carry else f"Write down {ones}, there is nothing to carry."
    return question, (
        f"Let us add {a} and {b} step by step. First add the ones: {a % 10} + {b % 10} = {ones}. {note} "
        f"Next add the tens: {a // 10} + {b // 10}{' + 1' if carry else ''} = {tens}. So the answer is {a + b}."
    )


def counting(rng: random.Random) -> Exchange:
    start, count, step = rng.randint(1, 40), rng.randint(8, 16), rng.choice([1, 2, 5, 10])
    question = rng.choice(
        [
            f"Count from {start} by {step}, {count} numbers.",
            f"List {count} numbers starting at {start} with step {step}.",
        ]
    )
    numbers = ", ".join(str(start + index * step) for index in range(count))
    return (
        question,
        f"Here are {count} numbers starting at {start} with step {step}: {numbers}. That is the complete list.",
    )


def capital(rng: random.Random) -> Exchange:
    country = rng.choice(list(COUNTRIES))
    city, continent = COUNTRIES[country]
    question = rng.choice(
        [
            f"What is the capital of {country}?",
            f"Tell me the capital city of {country}.",
            f"Which city is the capital of {country}?",
        ]
    )
    return question, (
        f"The capital of {country} is {city}. {country} is a country in {continent}, and {city} is its capital city. "
        f"If you visit {city}, you can learn a lot about the history and the people of {country}."
    )


def story(rng: random.Random) -> Exchange:
    hero, friend = rng.sample(NAMES, 2)
    animal, other = rng.sample(ANIMALS, 2)
    place, thing, quality = rng.choice(PLACES), rng.choice(THINGS), rng.choice(QUALITIES)
    question = rng.choice(
        [
            f"Write a short story about a {quality} {animal} named {hero}.",
            f"Tell me a story about {hero} the {quality} {animal}.",
        ]
    )
    said = rng.choice([f'"What a lovely {thing}!" said {hero}.', f"{hero} wondered who had lost the {thing}."])
    return question, (
        f"Once upon a time there was a {quality} {animal} named {hero}. {hero} lived near the {place}. "
        f"One day {hero} found a {thing} on the road. {said} Then {hero} met a {other} named {friend}. "
        f"{friend} had been looking for the {thing} all day. {hero} gave the {thing} back to {friend}, and {friend} was "
        f"very happy. From that day on, {hero} the {animal} and {friend} the {other} were best friends. The end."
    )


def code(rng: random.Random) -> Exchange:
    sign, verb = rng.choice([("+", "add"), ("-", "subtract"), ("*", "multiply")])
    number, name = rng.randint(2, 20), rng.choice(["x", "n", "value"])
    result = {"+": 10 + number, "-": 10 - number, "*": 10 * number}[sign]
    question = rng.choice([f"Write a Python function to {verb} {number}.", f"Give me Python code to {verb} {number}."])
    return question, (
        f"Here is a Python function:\n\ndef {verb}_{number}({name}):\n    result = {name} {sign} {number}\n"
        f"    return result\n\nYou can call {verb}_{number}(10) and it will return {result}. "
        f"The function takes one argument named {name} and returns {name} {sign} {number}."
    )


def repetition(rng: random.Random) -> Exchange:
    words, times = f"{rng.choice(QUALITIES)} {rng.choice(ANIMALS)}", rng.randint(3, 5)
    repeated = ", ".join([words] * times)
    return (
        f'Repeat the words "{words}" {times} times.',
        f'Sure, here it is: {repeated}. I repeated "{words}" {times} times.',
    )


def comparison(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(1, 100), 2)
    large, small = max(a, b), min(a, b)
    return rng.choice([f"Which is larger, {a} or {b}?", f"Compare {a} and {b}."]), (
        f"Let us compare {a} and {b}. The larger number is {large} and the smaller number is {small}. "
        f"The difference between them is {large - small}, because {large} - {small} = {large - small}."
    )


def plan(rng: random.Random) -> Exchange:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    question = rng.choice(
        [
            f"How can {name} take the {thing} to the {place}?",
            f"Make a plan for {name} to bring the {thing} to the {place}.",
        ]
    )
    return question, (
        f"Here is a plan for {name}:\n1. Find the {thing} and put it in a bag.\n"
        f"2. Check the map to see where the {place} is.\n3. Walk to the {place} with the {thing}.\n"
        f"4. Give the {thing} to a friend at the {place}.\n5. Walk back home before it gets dark.\n"
        f"Follow these steps and {name} will be done with the {thing} in no time."
    )


TOPICS: dict[Callable[[random.Random], Exchange], int] = {
    addition: 3, counting: 2, capital: 2, story: 4, code: 2, repetition: 1, comparison: 2, plan: 2,
}  # fmt: skip


def conversations(count: int, seed: int, most_exchanges: int = 1) -> Iterator[list[Turn]]:
    """``count`` conversations of one to ``most_exchanges`` questions, each with its answer."""
    rng = random.Random(seed)
    for topic in rng.choices(list(TOPICS), list(TOPICS.values()), k=count):
        turns: list[Turn] = []
        more = rng.randrange(most_exchanges) if most_exchanges > 1 else 0
        for each in [topic, *rng.choices(list(TOPICS), list(TOPICS.values()), k=more)]:
            question, answer = each(rng)
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield turns
