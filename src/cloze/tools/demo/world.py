"""Phrasings about the world: countries, places, landmarks, people, foods, the calendar."""

from __future__ import annotations

from cloze.tools.demo.phrasing import Domain, Topic

DOMAINS = (
    Domain(
        "countries",
        300,
        (
            Topic(
                (
                    "What is the capital of {name}?",
                    "Which city is the capital of {name}?",
                    "Where is {capital}?",
                ),
                (
                    "The capital of {name} is {capital}.",
                    "{Capital} is the capital of {name}.",
                    "{Capital} is a city in {name}.",
                    "{Name} has its capital in {capital}.",
                    "The capital city of {name} is {capital}.",
                    "If you travel to the capital of {name}, you go to {capital}.",
                ),
                weight=3,
            ),
            Topic(
                ("On which continent is {name}?", "Where is {name}?"),
                (
                    "{Name} is a country in {continent}.",
                    "{Name} lies in {continent}.",
                    "In {continent} there is a country called {name}.",
                    "You can find {name} on the map of {continent}.",
                    "The continent of {name} is {continent}.",
                ),
            ),
            Topic(
                ("Which language do people speak in {name}?", "What language should I learn for {name}?"),
                (
                    "People in {name} speak {language}.",
                    "Most people in {name} speak {language}.",
                    "The language of {name} is {language}.",
                    "If you travel to {name}, it helps to speak {language}.",
                    "In the schools of {name} children learn to write {language}.",
                ),
            ),
            Topic(
                ("Which money do people use in {name}?", "What is the currency of {name}?"),
                (
                    "The currency of {name} is the {currency}.",
                    "People in {name} pay with the {currency}.",
                    "The money of {name} is called the {currency}.",
                    "In {name} you pay with the {currency}.",
                ),
            ),
        ),
    ),
    Domain(
        "places",
        70,
        (
            Topic(
                ("Where is {name}?", "What is {name}?", "On which continent is {name}?"),
                (
                    "{Name} is {a kind} in {continent}.",
                    "{Name} is {a kind}.",
                    "You can find {name} in {continent}.",
                    "In {continent} there is {a kind} called {name}.",
                    "{Name} is in {continent}.",
                    "On the map of {continent} you see {name}, {a kind}.",
                ),
            ),
        ),
    ),
    Domain(
        "landmarks",
        40,
        (
            Topic(
                ("Where is {name}?", "In which city is {name}?", "Where do I have to go to see {name}?"),
                (
                    "{Name} is in {city}.",
                    "{Name} is a famous sight in {city}.",
                    "You can see {name} in {city}.",
                    "The city of {name} is {city}.",
                    "If you want to see {name}, go to {city}.",
                ),
            ),
            Topic(
                ("In which country is {name}?", "Which country has {name}?"),
                (
                    "{Name} is in {country}.",
                    "The country of {name} is {country}.",
                    "Visitors to {country} like to see {name}.",
                    "In {country} you can visit {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "people",
        60,
        (
            Topic(
                ("Who was {name}?", "What was the work of {name}?"),
                (
                    "{Name} was {a job}.",
                    "{Name} was a famous {job}.",
                    "The world remembers {name} as {a job}.",
                    "One famous {job} was {name}.",
                    "By profession {name} was {a job}.",
                ),
            ),
            Topic(
                ("Where was {name} born?", "Which country did {name} come from?"),
                (
                    "{Name} was born in {country}.",
                    "{Name} came from {country}.",
                    "The birthplace of {name} is in {country}.",
                    "{Name} was {a job} from {country}.",
                ),
            ),
            Topic(
                ("Who {verb} {work}?", "What is {name} known for?"),
                (
                    "{Name} {verb} {work}.",
                    "{Name} was the {job} who {verb} {work}.",
                    "It was {name} who {verb} {work}.",
                    "We know {name}, who {verb} {work}.",
                ),
            ),
        ),
        pronoun="",
    ),
    Domain(
        "foods",
        60,
        (
            Topic(
                ("What is {name} made from?", "How do people make {name}?", "What do I need for {name}?"),
                (
                    "{Name} is made from {source}.",
                    "People make {name} from {source}.",
                    "To make {name} you need {source}.",
                    "You get {name} from {source}.",
                ),
            ),
            Topic(
                ("Where does {name} come from?", "Which country is known for {name}?"),
                (
                    "{Name} is a food from {country}.",
                    "{Name} comes from {country}.",
                    "{Country} is known for {name}.",
                    "People in {country} like to eat {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "calendar",
        40,
        (
            Topic(
                ("Which {kind} comes after {before}?", "When is {name}?"),
                (
                    "{Name} comes after {before}.",
                    "{Name} follows {before}.",
                    "After {before} comes {name}.",
                    "The {kind} after {before} is {name}.",
                ),
            ),
            Topic(
                ("Which {kind} comes before {after}?", "What comes after {name}?"),
                (
                    "{Name} comes before {after}.",
                    "Before {after} comes {name}.",
                    "The {kind} before {after} is {name}.",
                    "{Name} is followed by {after}.",
                ),
            ),
            Topic(
                ("How many days does {name} have?", "How long is the month of {name}?"),
                (
                    "{Name} has {days} days.",
                    "There are {days} days in {name}.",
                    "The month of {name} has {days} days.",
                    "{Name} is a month of {days} days.",
                ),
            ),
        ),
    ),
)
