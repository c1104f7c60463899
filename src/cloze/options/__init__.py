"""What can be typed: flags and --config files into a command's dataclass, help, and completion of shells."""
