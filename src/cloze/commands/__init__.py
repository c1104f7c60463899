"""One module per subcommand, each with `run(config)`; `cloze.cli` imports the one that was asked for."""
