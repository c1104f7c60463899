"""One module per subcommand, each with `run(config)`; `cloze.cli.command_line` imports the one that was asked for."""
