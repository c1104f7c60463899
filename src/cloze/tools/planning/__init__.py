"""`cloze plan`: estimate memory, speed, days, and bytes on network and disk before a run.

    recipe = read_recipe(PlanConfig(recipe="roberta.yaml"))    # recipe.py: settings, model configuration, block size
    facts = model_facts(recipe, precision)                     # shapes.py: the model without weights (meta device)
    trace = trace_passes(facts, ...)                           # activations.py: what its passes keep, by tracing them
    needs = memory_of(choice, facts, world, trace, ...)        # utils/memory.py: parts of memory, by engine, in bytes
    pace = pace_of(choice, ...)                                # speed.py: an estimate, a range
    rows = weigh(...)                                          # choose.py: all choices, and the recommended one
    write_configs(folder, row, ...)                            # write.py: files for DeepSpeed and accelerate

No weights are loaded, no GPU is used, and nothing is asked of the network. (`training/run_schedule.py` is another
thing: the arithmetic of a run that is under way.)
"""
