"""Write metrics, send them to trackers, and record the sessions of a run."""
