"""Phrasings about matter and science: elements, physics, weather, computing, units, sciences."""

from __future__ import annotations

from cloze.tools.demo.phrasing import Domain, Topic

DEFINITION = Topic(
    ("What is {name}?", "Can you explain what {name} is?", "What do people mean by {name}?"),
    (
        "{Name} is {what}.",
        "In simple words, {name} is {what}.",
        "You can say that {name} is {what}.",
        "We call it {name}: {what}.",
        "{Name}, in short, is {what}.",
    ),
)

DOMAINS = (
    Domain(
        "elements",
        150,
        (
            Topic(
                ("What is the chemical symbol of {name}?", "How do chemists write {name}?"),
                (
                    "The symbol of {name} is {symbol}.",
                    "The chemical symbol of {name} is {symbol}.",
                    "Chemists write {symbol} for {name}.",
                    "The symbol {symbol} stands for {name}.",
                    "{Name} has the symbol {symbol}.",
                ),
                weight=2,
            ),
            Topic(
                ("Is {name} a solid, a liquid or a gas?", "Which state does {name} have at room temperature?"),
                (
                    "At room temperature {name} is {a state}.",
                    "{Name} is {a state} at room temperature.",
                    "In an ordinary room {name} is {a state}.",
                    "{Name} is {a state} when it is neither hot nor cold.",
                    "The state of {name} at room temperature is {state}.",
                ),
            ),
            Topic(
                ("What kind of element is {name}?", "Is {name} a metal?"),
                (
                    "{Name} is {a kind}.",
                    "The element {name} is {a kind}.",
                    "Chemists call {name} {a kind}.",
                    "{Name} is a chemical element and {a kind}.",
                    "Among the elements, {name} is {a kind}.",
                ),
            ),
            Topic(
                ("What is the atomic number of {name}?", "Which number does {name} have in the periodic table?"),
                (
                    "The atomic number of {name} is {number}.",
                    "{Name} has the atomic number {number}.",
                    "{Name} is element number {number}.",
                    "An atom of {name} has the atomic number {number}.",
                ),
            ),
            Topic(
                ("What is {name} used for?", "What do people do with {name}?"),
                (
                    "People use {name} for {use}.",
                    "{Name} is used for {use}.",
                    "One use of {name} is {use}.",
                    "The use of {name} for {use} is well known.",
                    "{Name} is useful for {use}.",
                ),
            ),
        ),
    ),
    Domain("physics", 60, (DEFINITION,), pronoun=""),
    Domain("weather", 60, (DEFINITION,), pronoun=""),
    Domain("computing", 60, (DEFINITION,), pronoun=""),
    Domain(
        "units",
        40,
        (
            Topic(
                ("What does the {name} measure?", "What is the {name}?", "What is measured in {plural}?"),
                (
                    "The {name} is a unit of {quantity}.",
                    "We measure {quantity} in {plural}.",
                    "Scientists measure {quantity} in {plural}.",
                    "The {name} is used to measure {quantity}.",
                    "A unit of {quantity} is the {name}.",
                    "{A name} is a unit that measures {quantity}.",
                ),
            ),
            Topic(
                ("What is the symbol of the {name}?", "How is the {name} written in short?"),
                (
                    "The symbol of the {name} is {symbol}.",
                    "The {name} has the symbol {symbol}.",
                    "Scientists write {symbol} for {plural}.",
                    "In short, the {name} is written {symbol}.",
                ),
            ),
        ),
    ),
    Domain(
        "sciences",
        40,
        (
            Topic(
                ("What is {name}?", "What does {name} study?", "What is the science of {object} called?"),
                (
                    "{Name} is the study of {object}.",
                    "{Name} is a science that studies {object}.",
                    "The science of {object} is called {name}.",
                    "People who study {object} work in {name}.",
                ),
            ),
            Topic(
                ("Who works in {name}?", "What is somebody who studies {object} called?"),
                (
                    "{A expert} studies {object}.",
                    "{A expert} is a scientist who works in {name}.",
                    "Somebody who studies {object} is called {a expert}.",
                    "The work of {a expert} is {name}.",
                ),
            ),
        ),
    ),
)
