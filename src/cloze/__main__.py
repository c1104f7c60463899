"""`python -m cloze` is `cloze`; `accelerate launch -m cloze train ...` comes in here on every rank."""

from cloze.cli import run

if __name__ == "__main__":
    run()
