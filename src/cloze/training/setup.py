"""Set up a run, ready for its next step.

Everything is checked here before the first step and, if possible, before any process group.

    run = set_up(config, stop, stack)
    start = resume(run)
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cloze.checkpoint.format import checkpoint_path, read_manifest, tidy
from cloze.checkpoint.identity import check_same_run, run_identity
from cloze.checkpoint.reader import PieceReader
from cloze.config import TrainConfig
from cloze.config.relations import check_relations
from cloze.data.batches.layout import Layout
from cloze.data.train_data import TrainData, masking_rule, open_data, words_for
from cloze.distributed.collectives import run_on_main_and_broadcast
from cloze.distributed.resilience.error_records import forget
from cloze.distributed.resilience.json_socket import failure_reported, lost_while_joining
from cloze.distributed.resilience.stop_signals import StopSignals
from cloze.distributed.resilience.watchdog import Watch
from cloze.distributed.world import RunShape, describe, settle_environment, start
from cloze.training.branch import branch_to_resume
from cloze.training.build_model import build_run_model
from cloze.training.checkpointing.engine_probe import check_probe
from cloze.training.checkpointing.restore import choose_checkpoint, load_state
from cloze.training.checkpointing.saver import CheckpointSaver
from cloze.training.determinism import settle_determinism
from cloze.training.engines.choose_engine import engine_for
from cloze.training.engines.deepspeed_file import engine_settings
from cloze.training.engines.precision import precision_here, precision_name
from cloze.training.find_batch_size import BatchProbe, fit_memory
from cloze.training.logging.trackers import begin_trackers, tracker_names
from cloze.training.nonfinite import steps_to_leave_out
from cloze.training.optim.lr_schedule import learning_rate_schedule
from cloze.training.optim.optimizers import build_optimizer
from cloze.training.prepare_model import (
    check_on_probe,
    check_start,
    choose_kernels,
    configure_async_steps,
    head_capacity,
    measure_pace,
    prepare_model,
)
from cloze.training.run import Run, Start
from cloze.training.run_dir import failure_log, open_run_folder, resolved, resumes_run
from cloze.training.run_schedule import (
    Plan,
    check_length,
    check_validation,
    describe_wide_steps,
    fit_layout,
    plan_run,
)
from cloze.training.same_on_ranks import compare_ranks
from cloze.utils.environment import processes
from cloze.utils.terminal.console import say, warn


def set_up(config: TrainConfig, stop: StopSignals, stack: ExitStack) -> Run:
    """Check everything, join the processes, build model, optimizer and engine. `stack` ends the watch over ranks."""
    _check_options(config)
    with failure_reported():
        data = _open_data(config)
        words = words_for(config, data)
        model, tokenizer = build_run_model(config, data)
        head = prepare_model(model, config, data)
    stop.hold()
    with lost_while_joining(config.ddp_timeout), stop.joining():
        accelerator = start(_run_shape(config, model.config.model_type))
        watch = stack.enter_context(watch_ranks(config, accelerator))
    engine = engine_for(accelerator)
    base = compare_ranks(config, data, model, tokenizer, engine)
    choose_kernels(model, config, engine)
    say("world", describe(accelerator, engine.support.name))
    run_on_main_and_broadcast(lambda: tidy(Path(config.output_dir)))
    checkpoint = choose_checkpoint(Path(config.output_dir), resume_choice(config), engine.rank, engine.world_size)
    saved = None if checkpoint is None else read_manifest(checkpoint)
    rule = masking_rule(config, data.manifest, 1, words)
    trial = BatchProbe(model, head, rule, data, config, engine)
    layout = fit_memory(fit_layout(config, engine.rank, engine.world_size, saved), trial)
    settle_determinism(trial, layout.per_device)
    plan = _plan(config, layout, data)
    schedule = learning_rate_schedule(config, plan.total_steps)  # may not fit the length: before anything is written
    identity = identify(config, data, plan, model, base, checkpoint)
    step = saved["position"]["global_step"] if saved else 0
    open_folder = partial(open_run_folder, config, data.manifest, identity, checkpoint, step)
    output_dir = watch.enable_error_log(run_on_main_and_broadcast(open_folder))
    optimizer, _ = build_optimizer(model, config, engine.offloads)
    say("model", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    engine.prepare(model, optimizer, plan.layout, config.max_grad_norm)
    head.use_dtype_of(engine.module)
    begin_trackers(accelerator, config, output_dir, resolved(config), step)
    masking = masking_rule(config, data.manifest, plan.total_samples, words)
    probe = check_on_probe(head, engine, data, masking, config.seed)
    return Run(
        config=config,
        output_dir=output_dir,
        data=data,
        masking=masking,
        plan=plan,
        engine=engine,
        identity=identity,
        checkpoint=checkpoint,
        saver=CheckpointSaver(engine, partial(_save_model_files, engine.module, tokenizer), config.async_save),
        schedule=schedule,
        probe=probe,
        head=head,
        capacity=head_capacity(plan, config, accelerator),
        stop=stop,
        watch=watch,
        excluded_steps=frozenset(run_on_main_and_broadcast(partial(steps_to_leave_out, output_dir, checkpoint))),
        pace=measure_pace(engine, config, data, plan, head.sparse),
        max_async_steps=configure_async_steps(engine, config),
    )


def _check_options(config: TrainConfig) -> None:
    """Check options and environment, which are the same on all ranks, so that all fail together."""
    check_relations(config)
    settle_environment()


def _open_data(config: TrainConfig) -> TrainData:
    """Check this machine, which takes seconds, before opening or preparing the data."""
    check_start(config)
    data = open_data(config)
    check_validation(config, has_validation=data.validation is not None)
    check_length(config, data.num_blocks, processes.world_size())
    data.check_maskable()
    return data


def _plan(config: TrainConfig, layout: Layout, data: TrainData) -> Plan:
    plan = plan_run(config, layout, data.num_blocks, data.block_size)
    wide = describe_wide_steps(config, plan)
    if wide is not None:
        warn(wide)
    return plan


def resume_choice(config: TrainConfig) -> str | None:
    """Return --resume_from_checkpoint; for `auto` in a branch without checkpoints, the one it starts from."""
    if config.resume_from_checkpoint != "auto":
        return config.resume_from_checkpoint
    origin = run_on_main_and_broadcast(lambda: branch_to_resume(Path(config.output_dir)))
    return "auto" if origin is None else str(origin)


def identify(
    config: TrainConfig, data: TrainData, plan: Plan, model: Any, base: str | None, checkpoint: Path | None
) -> dict[str, Any]:
    """Return what all starts of this run have in common, as the first one recorded it. `base`: the checksum of the
    base model. Raises CheckpointError if `checkpoint` is of another run."""
    identity = run_identity(config, plan.layout.global_batch, data.manifest, base)
    if data.streamed is not None:  # each rank has a stream of its own
        identity["world_size"] = plan.layout.world_size
    if checkpoint is not None:
        saved = read_manifest(checkpoint)["run"]
        check_same_run(checkpoint, saved, identity, model.config.to_dict())
        identity |= saved
    return identity


def watch_ranks(config: TrainConfig, accelerator: Accelerator) -> Watch:
    """Return the watch over the ranks of this run."""
    log, is_open = failure_log(config), resumes_run(config)
    if is_open and accelerator.is_main_process:
        forget(log.run_dir)  # all ranks have joined, and wait for this one
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return Watch(rank, world_size, config.hang_timeout, config.ddp_timeout, log, is_open)


def resume(run: Run) -> Start:
    """Load the chosen checkpoint into the engine, if there is one; return where training continues."""
    if run.checkpoint is None:
        return Start(0, evaluate=run.config.eval_on_start)
    manifest = read_manifest(run.checkpoint)
    was, now = precision_name(manifest["precision"]), precision_name(run.engine.accelerator.mixed_precision)
    if was != now:
        warn(f"{run.checkpoint} was trained in {was}, and this start trains in {now}: numbers differ from here on")
    with run.watch.phase("resume"):
        with PieceReader(run.checkpoint, manifest) as pieces:
            position = load_state(run.engine, pieces)
        run.engine.restore_loss_scale(manifest["loss_scale"])
        loss = check_probe(run.engine, run.head, run.checkpoint, manifest["precision"])
    layout = run.plan.layout
    say(
        "resume",
        f"from {run.checkpoint} at step {position.global_step:,}; loss on the stored batch {loss:.6f}, as stored; "
        f"{layout.world_size} x {layout.per_device} x {layout.accumulation} (ranks x batch x accumulation)",
    )
    if run.checkpoint == checkpoint_path(run.output_dir, position.global_step):
        run.saved = position.global_step, manifest["evaluation_pending"]
    places = manifest.get("stream")
    place = places[layout.rank] if places else None
    return Start(position.global_step, place, evaluate=manifest["evaluation_pending"])


def _run_shape(config: TrainConfig, model_type: str) -> RunShape:
    precision, why = precision_here(config, model_type)
    if why is not None:
        say("precision", why)
    return RunShape(
        use_cpu=config.use_cpu,
        precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        deepspeed=engine_settings(config.deepspeed),
        timeout_seconds=config.ddp_timeout,
        log_with=tracker_names(config),
        project_dir=config.output_dir,
    )


def _save_model_files(module: Any, tokenizer: Any, folder: Path) -> None:
    module.config.architectures = [type(module).__name__.removeprefix("FSDP")]  # fully_shard changes the class's name
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
