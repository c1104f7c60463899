"""Names of the files in a run's folder."""

CONFIG = "config.yaml"  # the resolved configuration
IDENTITY = "run.json"  # hyperparameters, global batch, checksum of the data
DATA = "data.json"  # the manifest of the prepared data
METRICS = "metrics.jsonl"  # one line per logged step
SESSIONS = "sessions.json"  # each start: devices, ranks, engine, versions
STATUS = "status.json"  # running, stopped, finished or failed
ERROR = "error.json"  # of a failed start: first failing rank, place, cause
SCORES = "eval.json"  # written by `cloze evaluate`
TRACKERS = "trackers.json"  # ids of the run in its trackers
EXCLUDED_STEPS = "left_out.json"  # steps whose batches are left out after a rollback
CHECKPOINT = "checkpoint.json"  # in each checkpoint-N: its manifest
