"""Phrasings about things people make and use: instruments, materials, tools, jobs, shapes, opposites."""

from __future__ import annotations

from cloze.tools.demo.phrasing import Domain, Topic

DOMAINS = (
    Domain(
        "instruments",
        50,
        (
            Topic(
                ("What kind of instrument is the {name}?", "To which family does the {name} belong?"),
                (
                    "The {name} is {a family} instrument.",
                    "{A name} is {a family} instrument.",
                    "The {name} belongs to the {family} family.",
                    "Musicians play the {name}, {a family} instrument.",
                    "In the {family} family you find the {name}.",
                    "The {name} is an instrument of the {family} family.",
                ),
            ),
        ),
    ),
    Domain(
        "materials",
        40,
        (
            Topic(
                ("What is {name} made from?", "Where does {name} come from?"),
                (
                    "{Name} is made from {source}.",
                    "People make {name} from {source}.",
                    "To make {name} you need {source}.",
                    "We get {name} from {source}.",
                ),
            ),
            Topic(
                ("What is {name} used for?", "Why do people need {name}?"),
                (
                    "{Name} is used for {use}.",
                    "People use {name} for {use}.",
                    "{Name} is useful for {use}.",
                    "One use of {name} is {use}.",
                ),
            ),
        ),
    ),
    Domain(
        "tools",
        40,
        (
            Topic(
                ("What is {a name} for?", "What do people do with {a name}?", "Why would I need {a name}?"),
                (
                    "People use {a name} to {use}.",
                    "{A name} is used to {use}.",
                    "With {a name} you can {use}.",
                    "{A name} is a thing to {use} with.",
                    "{A name} helps you to {use}.",
                    "You take {a name} to {use}.",
                ),
            ),
        ),
    ),
    Domain(
        "jobs",
        40,
        (
            Topic(
                ("What does {a name} do?", "What is the work of {a name}?", "Who {verb} {object}?"),
                (
                    "{A name} {verb} {object}.",
                    "{A name} is a person who {verb} {object}.",
                    "Somebody who {verb} {object} is {a name}.",
                    "At work {a name} {verb} {object}.",
                    "The {name} {verb} {object}.",
                ),
            ),
        ),
        pronoun="",
    ),
    Domain(
        "shapes",
        20,
        (
            Topic(
                ("How many sides does {a name} have?", "What is {a name}?"),
                (
                    "{A name} has {sides} sides.",
                    "{A name} is a shape with {sides} sides.",
                    "The number of sides of {a name} is {sides}.",
                    "Draw {sides} straight sides and you may get {a name}.",
                    "{A name} has {sides} corners.",
                ),
            ),
        ),
    ),
    Domain(
        "opposites",
        40,
        (
            Topic(
                ("What is the opposite of {name}?", "Which word means the opposite of {name}?"),
                (
                    "The opposite of {name} is {opposite}.",
                    "The opposite of {opposite} is {name}.",
                    "What is not {name} may be {opposite}.",
                    "{Opposite} is the opposite of {name}.",
                    "The words {name} and {opposite} are opposites.",
                ),
            ),
        ),
        pronoun="",
    ),
)
