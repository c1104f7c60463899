"""Run forward, backward and step with DDP, DeepSpeed or FSDP2."""
