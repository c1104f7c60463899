"""The entry point of `python -m cloze`, with which launchers start every rank."""

from cloze.cli import run

if __name__ == "__main__":
    run()
