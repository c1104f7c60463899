"""One module per command, each with `run(config)`. `cloze.cli.command_line` imports the one that is needed."""
