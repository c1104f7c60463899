# shellcheck shell=bash
# Sourced by launch/demo and launch/test: a Python environment in .venv with the pinned set, made where it is missing.
#
#   source launch/env.sh
#   prepare_environment tensorboard        # the extras of pyproject.toml, separated by commas
#
# CLOZE_INSTALL=no installs no system packages, CLOZE_INSTALL=yes does without a question.
# PYTHON=/path/to/python chooses the interpreter. Works from any folder; leaves the shell in the repository root.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$ROOT" || exit

say() { printf '%-12s %s\n' "$1" "$2"; }

stop() {
    printf 'launch: error: %s\n' "$1" >&2
    exit 2
}

# may_install WHAT PACKAGE...: whether apt-get may install these, after saying so. A terminal is asked.
may_install() {
    local what="$1" reply=""
    shift
    [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null || return 1
    if [[ ${CLOZE_INSTALL:-} == no ]]; then
        say system "left out (CLOZE_INSTALL=no): $*"
        return 1
    fi
    say system "apt-get installs for $what: $* (CLOZE_INSTALL=no leaves them out)"
    if [[ -z ${CLOZE_INSTALL:-}${CI:-} && -t 0 && -t 1 ]]; then
        read -r -p "install them as root? [Y/n] " reply
    fi
    [[ $reply != [nN]* ]]
}

# install_debian PACKAGE...: after `may_install` said yes.
install_debian() {
    local log
    export DEBIAN_FRONTEND=noninteractive
    log="$({ apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } 2>&1)" || {
        printf '%s\n' "$log" >&2
        stop "apt-get could not install: $*"
    }
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        [[ -z ${PYTHON:-} ]] || stop "PYTHON=$PYTHON is not a Python 3.10 or newer"
    done
    stop "no Python 3.10 or newer is here; install python3.11, or set PYTHON=/path/to/python"
}

# Whole, and made for this folder: a .venv that was moved or copied along still points to the old one.
venv_is_usable() {
    grep -qsF -- "$ROOT/.venv/" .venv/bin/pip && .venv/bin/python -m pip --version >/dev/null 2>&1
}

make_venv() {
    local python version
    python="$(find_python)"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    # Debian ships venv without ensurepip, which fails only after half of .venv is there: so ask first.
    "$python" -c 'import ensurepip, venv' 2>/dev/null || {
        may_install "a Python environment" "python$version-venv" ||
            stop "please install: python$version-venv (on Debian or Ubuntu: sudo apt-get install python$version-venv)"
        install_debian "python$version-venv"
    }
    say environment "making .venv with Python $version"
    "$python" -m venv --clear .venv
}

# Without compiling: that is a third of the time, and an import compiles what it needs.
install() {
    .venv/bin/python -m pip install -qq --no-input --no-compile --disable-pip-version-check \
        -c launch/constraints.txt "$@"
}

# The stamp has one line per set of extras that is installed; it goes before an install begins and comes back after.
install_once() {
    local extras="$1" stamp=.venv/.installed hash kept
    hash="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -d ' ' -f 1)"
    venv_is_usable || make_venv
    if grep -qsxF "$hash $extras" "$stamp"; then
        return
    fi
    kept="$(grep -s "^$hash " "$stamp" || true)"
    rm -f "$stamp"
    say install "PyTorch"
    install torch
    say install "Cloze and what it needs ($extras); some minutes the first time"
    install -e ".[$extras]"
    printf '%s\n' ${kept:+"$kept"} "$hash $extras" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

prepare_environment() {
    (
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            say install "waiting for another one to finish"
            flock 9
        fi
        install_once "$1"
    ) 9>.venv.lock
    export VIRTUAL_ENV="$ROOT/.venv" PATH="$ROOT/.venv/bin:$PATH"
    # Containers often set PYTHONDONTWRITEBYTECODE: every start would spend seconds compiling PyTorch and transformers.
    unset PYTHONHOME PYTHONDONTWRITEBYTECODE
}
