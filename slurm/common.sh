# shellcheck shell=bash disable=SC2034
# Sourced by the batch scripts: the environment of a job, and how a step is run that may be stopped at any time.
#
#   source slurm/common.sh
#   run_step srun ... cloze evaluate ...     # returns the step's exit code; on USR1 and TERM it passes TERM to the step
#   finish "$code"                           # leave the job as the exit code asks: done, failed, or queued again, at most
#                                            # MAX_RESTARTS times for failures (`finish CODE counted`: the caller counts)

export PATH="$PWD/.venv/bin:$PATH"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since SLURM 22.05 srun does not take it from the job
run_in=()      # a container's command in front of every command, and flags for srun: see site.env.example
srun_flags=()
if [[ -f slurm/site.env ]]; then
    # shellcheck disable=SC1091
    source slurm/site.env
fi

tell() { printf '%-12s %s\n' "slurm" "$1"; }

random_number() { # BYTES, as hexadecimal digits
    head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

# A random port of this node, the first of the job, that nobody listens at; below those of outgoing connections.
free_port() {
    local port
    for _ in {1..100}; do
        port="$((16#$(random_number 2) % 12000 + 20000))"
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    return 1
}

job_state() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' JobState=[A-Z_]*' | cut -d = -f 2; }

# A signal to this shell means: the time is nearly over, another job needs the nodes, or somebody wants the job to end.
# Only the step can save. Signals to srun itself would kill the step at once, so it goes through the controller.
stopping=""
stop_step() {
    [[ -z $stopping ]] || return 0
    stopping="$1"
    tell "$1: asking the step to save and stop"
    scancel --signal=TERM "$SLURM_JOB_ID" || true # to the steps, not to this shell
}

run_step() {
    local pid code
    trap 'stop_step USR1' USR1
    trap 'stop_step TERM' TERM
    "$@" &
    pid=$!
    while :; do # a signal ends `wait` before the step has ended
        code=0
        wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    return "$code"
}

# Exit codes are Cloze's: 0 done, 2 something that a person has to mend; everything else may go well the next time.
finish() {
    local code="$1" why="exit code $1"
    case "$code" in
        0 | 2) exit "$code" ;;
    esac
    if [[ $(job_state) != RUNNING ]]; then # cancelled by a person, or out of time
        tell "not queued again: the job was cancelled, or has no time left"
        exit "$code"
    fi
    if [[ -n $stopping ]]; then
        why="stopped by $stopping"
    elif [[ ${2:-} != counted ]] && ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-3})); then
        tell "not queued again: failed after ${SLURM_RESTART_COUNT:-0} restarts"
        exit "$code"
    fi
    tell "queued again ($why)"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # requeueing ends this shell
    exit "$code"
}
