"""Phrasings about the sky: galaxies, planets, moons, stars."""

from __future__ import annotations

from cloze.tools.demo.phrasing import Domain, Topic

DOMAINS = (
    Domain(
        "galaxies",
        80,
        (
            Topic(
                (
                    "What kind of galaxy is {name}?",
                    "What is the shape of {name}?",
                    "Is {name} a spiral galaxy?",
                    "What does {name} look like from far away?",
                ),
                (
                    "{Name} is {a shape} galaxy.",
                    "{Name} is {a shape} galaxy full of stars.",
                    "The shape of {name} is {shape}.",
                    "Astronomers call {name} {a shape} galaxy.",
                    "{Name} has the shape of {a shape} galaxy.",
                    "We know that {name} is {a shape} galaxy.",
                    "Among galaxies, {name} is {shape}.",
                    "{A shape} galaxy such as {name} holds a great many stars.",
                ),
            ),
            Topic(
                ("In which constellation is {name}?", "Where in the sky can I find {name}?"),
                (
                    "{Name} is a galaxy in the constellation {constellation}.",
                    "{Name} lies in the constellation {constellation}.",
                    "In the constellation {constellation} you can find {name}.",
                    "Look for {name} in {constellation}.",
                    "The constellation of {name} is {constellation}.",
                ),
            ),
            Topic(
                ("In which galaxy are we?", "To which galaxy does {star} belong?"),
                (
                    "{Star} is one of the many stars of {name}.",
                    "{Star} belongs to {name}, {a shape} galaxy.",
                    "Our own galaxy is {name}, and it is {shape}.",
                    "Our home, {name}, is {a shape} galaxy.",
                    "We live in {a shape} galaxy, {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "planets",
        70,
        (
            Topic(
                ("Which place does {name} have in the solar system?", "How far from the Sun is {name}?"),
                (
                    "{Name} is the {order} planet from the Sun.",
                    "The {order} planet from the Sun is {name}.",
                    "Counted from the Sun, {name} is the {order} planet.",
                    "{Name} is {order} in line from the Sun.",
                    "Of the eight planets, {name} is the {order}.",
                ),
                weight=4,
            ),
            Topic(
                ("What kind of planet is {name}?", "What is {name} made of?"),
                (
                    "{Name} is {a kind}.",
                    "The planet {name} is {a kind}.",
                    "Astronomers call {name} {a kind}.",
                    "{Name} is {a kind} that goes around the Sun.",
                ),
            ),
            Topic(
                ("How many moons does {name} have?", "Does {name} have a moon?"),
                (
                    "{Name} has {moons}.",
                    "The planet {name} has {moons}.",
                    "The number of moons matters: {name} has {moons}.",
                    "Astronomers know that {name} has {moons}.",
                ),
            ),
            Topic(
                ("What is special about {name}?", "What is {name} known for?"),
                (
                    "{Name} is {fame}.",
                    "{Name} is known as {fame}.",
                    "In the solar system, {name} is {fame}.",
                    "If you look for {fame}, look for {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "moons",
        40,
        (
            Topic(
                ("Which planet does {name} go around?", "What is {name}?", "To which planet does {name} belong?"),
                (
                    "{Name} is a moon of {planet}.",
                    "{Name} goes around {planet}.",
                    "The planet of {name} is {planet}.",
                    "{Name} belongs to {planet}.",
                    "Around {planet} goes {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "stars",
        40,
        (
            Topic(
                ("In which constellation is {name}?", "Where in the sky is {name}?"),
                (
                    "{Name} is a star in {constellation}.",
                    "In the constellation {constellation} you can see {name}.",
                    "{Name} belongs to the constellation {constellation}.",
                    "The star {name} is in {constellation}.",
                    "{Name} is a bright star in {constellation}.",
                ),
            ),
            Topic(
                ("What color is the star {name}?", "What color does {name} have?"),
                (
                    "{Name} is {a color} star.",
                    "The star {name} is {color}.",
                    "The color of the star {name} is {color}.",
                    "{Name} shines in the night as {a color} star.",
                    "Seen from here, {name} looks {color}.",
                ),
            ),
        ),
    ),
)
