"""How facts are said: questions and statements with places for the columns of a fact table.

`{name}` is a column, `{a name}` the same with its article, and a capital letter (`{Name}`, `{A name}`) begins a
sentence. A statement is true of every row of its table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """One fact table: how often it is talked about, what is asked, and what is answered."""

    table: str
    weight: int
    questions: tuple[str, ...]
    statements: tuple[str, ...]


DOMAINS = (
    Domain(
        "galaxies",
        9,
        ("What kind of galaxy is {name}?", "What is the shape of {name}?", "Is {name} a spiral galaxy?"),
        (
            "{Name} is {a shape} galaxy.",
            "{Name} is {a shape} galaxy made of billions of stars.",
            "The shape of {name} is {shape}.",
            "Astronomers call {name} {a shape} galaxy.",
            "{Name} has the shape of {a shape} galaxy.",
            "We know that {name} is {a shape} galaxy.",
            "Among galaxies, {name} is {shape}.",
            "{A shape} galaxy such as {name} holds billions of stars.",
        ),
    ),
    Domain(
        "animals",
        22,
        (
            "What kind of animal is the {name}?",
            "What does the {name} eat?",
            "Where does the {name} live?",
            "What is a young {name} called?",
        ),
        (
            "{A name} is {a group}.",
            "The {name} is {a group} that eats {diet}.",
            "{A name} eats {diet}.",
            "The food of the {name} is {diet}.",
            "A young {name} is called {a young}.",
            "The young of the {name} is called {a young}.",
            "The {name} lives {home}.",
            "You can find the {name} {home}.",
            "Like every {group}, the {name} needs food and water.",
            "The {name} belongs to the {group} group.",
            "{A name} is {a group} and it lives {home}.",
        ),
    ),
    Domain(
        "countries",
        26,
        ("What is the capital of {name}?", "On which continent is {name}?", "Where is {capital}?"),
        (
            "The capital of {name} is {capital}.",
            "{Capital} is the capital of {name}.",
            "{Name} is a country in {continent}.",
            "{Capital} is a city in {name}.",
            "The government of {name} sits in {capital}.",
            "{Name} lies in {continent} and its capital is {capital}.",
            "In {continent} there is a country called {name}.",
            "The country of {name} has its capital in {capital}.",
        ),
    ),
    Domain(
        "elements",
        14,
        (
            "What is the chemical symbol of {name}?",
            "Is {name} a solid, a liquid or a gas?",
            "What kind of element is {name}?",
        ),
        (
            "The symbol of {name} is {symbol}.",
            "{Name} is {a kind}.",
            "At room temperature {name} is {a state}.",
            "{Name} is {a state} at room temperature.",
            "The element {name} is {a kind} with the symbol {symbol}.",
            "Chemists write {symbol} for {name}.",
            "{Name} is a chemical element.",
        ),
    ),
    Domain(
        "planets",
        6,
        ("Which place does {name} have in the solar system?", "What kind of planet is {name}?"),
        (
            "{Name} is the {order} planet from the Sun.",
            "{Name} is {a kind} planet.",
            "The {order} planet from the Sun is {name}.",
            "{Name} goes around the Sun.",
            "Counted from the Sun, {name} is the {order} planet.",
            "The planet {name} is {kind}.",
        ),
    ),
    Domain(
        "moons",
        4,
        ("Which planet does {name} go around?", "What is {name}?"),
        (
            "{Name} is a moon of {planet}.",
            "{Name} goes around {planet}.",
            "The moon {name} belongs to {planet}.",
            "One of the moons of {planet} is {name}.",
        ),
    ),
    Domain(
        "stars",
        5,
        ("In which constellation is {name}?", "What color is the star {name}?"),
        (
            "{Name} is a star in {constellation}.",
            "The star {name} is {color}.",
            "{Name} is {a color} star in the constellation {constellation}.",
            "In the constellation {constellation} you can see {name}.",
            "The color of the star {name} is {color}.",
        ),
    ),
    Domain(
        "organs",
        6,
        ("What does the {name} do?", "To which system does the {name} belong?"),
        (
            "The {name} {verb} {object}.",
            "The {name} is a part of the {system} system.",
            "The {name} is a part of the body that {verb} {object}.",
            "In the human body the {name} {verb} {object}.",
            "The {system} system includes the {name}.",
        ),
    ),
    Domain(
        "produce",
        7,
        ("What color is {a name}?", "Is {a name} a fruit or a vegetable?"),
        (
            "{A name} is {a kind}.",
            "A ripe {name} is {color}.",
            "The color of a ripe {name} is {color}.",
            "{A name} is {a color} {kind}.",
            "People eat the {name} as food.",
        ),
    ),
    Domain(
        "instruments",
        6,
        ("What kind of instrument is the {name}?", "To which family does the {name} belong?"),
        (
            "The {name} is {a family} instrument.",
            "{A name} is a musical instrument.",
            "The {name} belongs to the {family} family.",
            "Musicians play the {name}, {a family} instrument.",
            "In the {family} family you find the {name}.",
        ),
    ),
    Domain(
        "units",
        6,
        ("What does the {name} measure?", "What is the symbol of the {name}?"),
        (
            "The {name} is a unit of {quantity}.",
            "We measure {quantity} in the {name}.",
            "The symbol of the {name} is {symbol}.",
            "Scientists measure {quantity} with the {name}.",
            "{A name} is an amount of {quantity}.",
        ),
    ),
    Domain(
        "sciences",
        5,
        ("What is {name}?", "What does {name} study?"),
        (
            "{Name} is the study of {object}.",
            "{Name} is a science that studies {object}.",
            "The science of {object} is called {name}.",
            "People who study {object} work in {name}.",
        ),
    ),
    Domain(
        "rivers",
        5,
        ("Where is the {name}?", "What is the {name}?"),
        (
            "The {name} is {a kind} in {continent}.",
            "The {name} is {a kind}.",
            "You can find the {name} in {continent}.",
            "In {continent} there is {a kind} called the {name}.",
        ),
    ),
)
