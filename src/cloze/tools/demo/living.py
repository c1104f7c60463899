"""Phrasings about living things: animals, dinosaurs, plants, fruit and vegetables, organs, bones."""

from __future__ import annotations

from cloze.tools.demo.phrasing import Domain, Topic

DOMAINS = (
    Domain(
        "animals",
        240,
        (
            Topic(
                ("What kind of animal is the {name}?", "What is {a name}?", "To which group does the {name} belong?"),
                (
                    "{A name} is {a group}.",
                    "The {name} is {a group}.",
                    "The {name} belongs to the {group} group.",
                    "{A name} is an animal, and more exactly {a group}.",
                    "Zoologists call the {name} {a group}.",
                    "Every {name} is {a group}.",
                    "Like any other {group}, {a name} needs food and water.",
                ),
                weight=3,
            ),
            Topic(
                ("What does the {name} eat?", "What is the food of the {name}?", "What do I feed {a name}?"),
                (
                    "{A name} eats {diet}.",
                    "The food of the {name} is {diet}.",
                    "The {name} is {a group} that eats {diet}.",
                    "The {name} lives on {diet}.",
                    "{A name} feeds on {diet}.",
                    "When it is hungry, {a name} eats {diet}.",
                ),
            ),
            Topic(
                ("Where does the {name} live?", "Where can I see {a name}?", "What is the home of the {name}?"),
                (
                    "The {name} lives {home}.",
                    "You can find the {name} {home}.",
                    "{A name} makes its home {home}.",
                    "{A name} is {a group} and it lives {home}.",
                    "If you want to see {a name}, look {home}.",
                ),
            ),
            Topic(
                ("What is a young {name} called?", "What is the young of the {name} called?"),
                (
                    "A young {name} is called {a young}.",
                    "The young of the {name} is called {a young}.",
                    "A baby {name} is {a young}.",
                    "{A young} is what we call a young {name}.",
                    "When {a name} is young, we call it {a young}.",
                ),
            ),
            Topic(
                ("How many legs does {a name} have?", "On how many legs does the {name} walk?"),
                (
                    "{A name} has {legs} legs.",
                    "The {name} has {legs} legs.",
                    "{A name} is {a group} with {legs} legs.",
                    "Count the legs of {a name}: it has {legs} legs.",
                    "The number of legs that {a name} has is easy to count: {legs} legs.",
                ),
            ),
            Topic(
                ("What covers the body of the {name}?", "Does the {name} have fur, feathers or scales?"),
                (
                    "The body of the {name} is covered with {cover}.",
                    "The {name} is covered with {cover}.",
                    "{A name} has {cover}.",
                    "{A name} is {a group} with {cover}.",
                    "You will see {cover} on {a name}.",
                ),
            ),
            Topic(
                ("What sound does {a name} make?", "How does the {name} sound?"),
                (
                    "{A name} {sound}.",
                    "The {name} {sound}.",
                    "Listen to the {name}: it {sound}.",
                    "When it makes a sound, {a name} {sound}.",
                    "The {name} is {a group} that {sound}.",
                ),
            ),
        ),
    ),
    Domain(
        "dinosaurs",
        30,
        (
            Topic(
                ("What did {name} eat?", "Was {name} dangerous to other animals?"),
                (
                    "{Name} was a dinosaur that ate {diet}.",
                    "The dinosaur {name} ate {diet}.",
                    "The food of {name} was {diet}.",
                    "{Name} lived on {diet}.",
                ),
            ),
            Topic(
                ("When did {name} live?", "In which period did {name} live?"),
                (
                    "{Name} lived in the {period} period.",
                    "{Name} was a dinosaur of the {period}.",
                    "The {period} was the time of {name}.",
                    "In the {period} period there was a dinosaur called {name}.",
                ),
            ),
        ),
    ),
    Domain(
        "plants",
        40,
        (
            Topic(
                ("What kind of plant is the {name}?", "What is {a name}?"),
                (
                    "{A name} is {a kind}.",
                    "The {name} is {a kind}.",
                    "The {name} is a plant, and more exactly {a kind}.",
                    "Botanists call the {name} {a kind}.",
                ),
            ),
            Topic(
                ("Is the {name} green in winter?", "Does the {name} lose its leaves?"),
                (
                    "The {name} is {a leaves} {kind}.",
                    "{A name} is {leaves}.",
                    "Botanists call the {name} {leaves}.",
                    "Among {leaves} plants we count the {name}.",
                ),
            ),
            Topic(
                ("What grows on the {name}?", "How does the {name} spread?"),
                (
                    "The {name} makes {seed}.",
                    "You can find {seed} on {a name}.",
                    "The {name} is {a kind} that makes {seed}.",
                    "From the {name} we get {seed}.",
                ),
            ),
        ),
    ),
    Domain(
        "produce",
        50,
        (
            Topic(
                ("Is {a name} a fruit or a vegetable?", "What is {a name}?"),
                (
                    "{A name} is {a kind}.",
                    "The {name} is {a kind}.",
                    "Cooks call the {name} {a kind}.",
                    "You can eat the {name}, {a kind}.",
                    "{A name} is {a kind} that people like to eat.",
                ),
            ),
            Topic(
                ("What color is {a name}?", "What color does the {name} have?"),
                (
                    "{A name} is {color}.",
                    "The color of the {name} is {color}.",
                    "{A name} is {a color} {kind}.",
                    "The {name} is a {kind} and it is {color}.",
                    "Think of something {color}: {a name}.",
                ),
            ),
        ),
    ),
    Domain(
        "organs",
        50,
        (
            Topic(
                ("What does the {name} do?", "What is the {name} for?", "Why do we need the {name}?"),
                (
                    "The {name} {verb} {object}.",
                    "In the human body the {name} {verb} {object}.",
                    "The {name} is a part of the body that {verb} {object}.",
                    "You need the {name} because it {verb} {object}.",
                    "The work of the {name} is simple: it {verb} {object}.",
                ),
            ),
            Topic(
                ("To which system does the {name} belong?", "What is the {name} a part of?"),
                (
                    "The {name} is a part of the {system} system.",
                    "The {system} system includes the {name}.",
                    "The {name} belongs to the {system} system.",
                    "Doctors count the {name} in the {system} system.",
                ),
            ),
        ),
    ),
    Domain(
        "bones",
        25,
        (
            Topic(
                ("Where is the {name}?", "What is the {name}?"),
                (
                    "The {name} is a bone of the {place}.",
                    "The {name} is a bone in the {place}.",
                    "You have {a name} in the {place}.",
                    "In the {place} there is a bone called the {name}.",
                    "Doctors find the {name} in the {place}.",
                ),
            ),
        ),
    ),
)
