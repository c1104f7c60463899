"""The commands as functions (`functions`), and a run that is trained in this process or in local workers."""
