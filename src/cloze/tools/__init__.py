"""Commands around a run: plan, launch, inspect, report, grow, measure."""
