"""The only code that interprets environment variables of launchers: torchrun, accelerate, DeepSpeed, MPI and SLURM.

    processes   which process of how many this is, and where rank 0 is met
    requests    what the launcher asks for: DeepSpeed, FSDP2, a precision, the CPU
    table       every variable that accelerate and DeepSpeed read, and what Cloze does with it
    settle      apply the table: refuse, or remove with a message what would change a run behind its options

Default files need no reader of their own. accelerate's default_config.yaml and DeepSpeed's ~/.deepspeed_env are read
by their launchers, which put what they say into the environment of the ranks, where the table applies. No launcher
reads a file `.env`.
"""
