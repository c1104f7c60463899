"""`cloze bench`: measure speed and memory, next to other tools. The benchmarks print tables and assert nothing."""
