# shellcheck shell=sh
# Makes the checkout's virtual environment, .venv. Sourced by demo, test and .ci/run:
#
#     root=/path/of/the/checkout
#     . "$root/.ci/environment.sh"
#     environment demo|test|check
#
# Afterwards $python is the environment's interpreter and PATH begins with its scripts. Each level holds what the one
# before it does: `demo` what the demo imports, `test` the test group, `check` the linters, the type checkers and the
# benchmarks' peers.
#
# POSIX sh only: no `local`, so the names of the functions' variables begin with env_.

env_dir=${root:?is to be set by the script that sources this one}/.venv
env_stamp=$env_dir/.workerpools
env_lock=$root/.venv.lock
# The second of two simultaneous starts waits for the first one's downloads.
env_wait_limit=900
python=$env_dir/bin/python

# Only .venv counts, whatever environment happens to be active. The options of pip that install somewhere else would
# do so from inside .venv too; which index to use stays the user's own configuration.
unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME __PYVENV_LAUNCHER__
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIRE_VIRTUALENV
unset UV_SYSTEM_PYTHON UV_PROJECT UV_PROJECT_ENVIRONMENT UV_WORKING_DIRECTORY

env_say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
env_die() { env_say "$*"; exit 1; }

env_rank() {
    case $1 in
        demo) echo 1 ;;
        test) echo 2 ;;
        check) echo 3 ;;
        *) echo 0 ;;
    esac
}

# What an up-to-date stamp says in its first line. A checkout that was copied or moved has scripts and an editable
# install that point to the old place, so the path is part of it.
env_wanted() {
    printf '%s %s\n' "$(cat "$root/pyproject.toml" "$root/.ci/environment.sh" | cksum | tr ' ' -)" "$root"
}

# The interpreter's identity, or nothing when the environment cannot run. After an upgrade of the system's Python the
# links still work, but the packages are in the old version's directory and nothing can be imported.
env_interpreter() {
    [ -x "$python" ] || return 0
    "$python" -I -c '
import sys
from importlib.util import find_spec
if sys.prefix != sys.base_prefix and sys.version_info >= (3, 10):
    print(sys.implementation.cache_tag, "complete" if find_spec("celery") and find_spec("workerpools") else "bare")
' 2>/dev/null || :
}

env_stamp_line() { sed -n "${1}p" "$env_stamp" 2>/dev/null || :; }

env_is_current() {
    [ -f "$env_stamp" ] &&
        [ "$(env_stamp_line 1)" = "$(env_wanted)" ] &&
        [ "$(env_rank "$(env_stamp_line 3)")" -ge "$(env_rank "$1")" ] &&
        [ "$(env_stamp_line 2)" = "$(env_interpreter)" ]
}

# --- The lock -----------------------------------------------------------------------------------------------------
#
# A directory, because mkdir either makes it or fails, on every file system. Its `owner` file says which process holds
# it; a process is known by its number and its start time, since numbers are used again.

env_process() {
    if [ -r "/proc/$1/stat" ]; then
        # The name in brackets may hold spaces; the start time is the 20th field after it.
        printf '%s %s\n' "$1" "$(sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20)"
    elif command -v ps >/dev/null 2>&1 && ps -p "$1" >/dev/null 2>&1; then
        printf '%s %s\n' "$1" "$(ps -p "$1" -o lstart= | tr ' ' _)"
    elif kill -0 "$1" 2>/dev/null; then
        printf '%s running\n' "$1"
    fi
}

env_lock_owner() { cat "$env_lock/owner" 2>/dev/null || :; }

env_acquire() {
    # $$ is the script's process even in a subshell, and this one may outlive it.
    env_me=$(exec sh -c 'echo "$PPID"')
    env_me=$(env_process "$env_me")
    env_waited=0
    env_ownerless=0
    until mkdir "$env_lock" 2>/dev/null; do
        [ -d "$env_lock" ] || [ -w "$root" ] || env_die "cannot write to $root."
        env_owner=$(env_lock_owner)
        if [ -z "$env_owner" ]; then
            # Its maker is between two steps, or was killed there.
            env_ownerless=$((env_ownerless + 1))
        else
            env_ownerless=0
        fi
        if [ "$env_ownerless" -ge 10 ] ||
            { [ -n "$env_owner" ] && [ "$(env_process "${env_owner%% *}")" != "$env_owner" ]; }; then
            # Its owner is dead. Of several waiters one alone can make this directory, and it looks again afterwards:
            # the lock may have been released and taken by a living process in between.
            env_claim="$env_lock/claim-${env_owner%% *}"
            if mkdir "$env_claim" 2>/dev/null; then
                [ "$(env_lock_owner)" != "$env_owner" ] || break
                rmdir "$env_claim" 2>/dev/null || :
            fi
        fi
        [ "$env_waited" -ne 0 ] || env_say "waiting for another process that is making .venv"
        env_waited=$((env_waited + 1))
        [ "$env_waited" -le "$env_wait_limit" ] ||
            env_die "gave up waiting; if nothing is making .venv, remove $env_lock and start again."
        sleep 1
    done
    printf '%s\n' "$env_me" >"$env_lock/owner.new"
    mv "$env_lock/owner.new" "$env_lock/owner"
}

# --- Finding a Python ---------------------------------------------------------------------------------------------

# uv, if it is there and recent enough to know dependency groups.
env_has_uv() {
    command -v uv >/dev/null 2>&1 && uv pip install --help 2>/dev/null | grep -q -e '--group'
}

# Sets env_base to a Python >= 3.10 that can make virtual environments, or says what to install.
env_find_python() {
    env_base=
    env_without_venv=
    for env_name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        env_candidate=$(command -v "$env_name" 2>/dev/null) || continue
        "$env_candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue
        # Asked first: where Debian's python3-venv is absent, `python3 -m venv` fails and leaves half a directory.
        if "$env_candidate" -I -c 'import ensurepip, venv' >/dev/null 2>&1; then
            env_base=$env_candidate
            return 0
        fi
        [ -n "$env_without_venv" ] || env_without_venv=$env_candidate
    done
    if [ -n "$env_without_venv" ]; then
        env_die "$env_without_venv cannot make virtual environments: apt-get install python3-venv, or install uv."
    fi
    env_die "Python 3.10 or newer is needed and none is on PATH: apt-get install python3 python3-venv, or install uv."
}

# --- Making it ----------------------------------------------------------------------------------------------------

env_create() {
    rm -rf "$env_dir"
    mkdir "$env_dir"
    # Until the last step has succeeded the stamp says that this is half an environment.
    echo making >"$env_stamp"
    if env_has_uv; then
        uv venv --quiet --allow-existing "$env_dir"
    else
        "$env_base" -m venv "$env_dir"
    fi
}

env_install() {
    case $1 in
        demo) set -- --group demo ;;
        test) set -- --group test ;;
        check) set -- --group test --group lint --group types --group benchmarks ;;
    esac
    if env_has_uv; then
        uv pip install --quiet --python "$python" --editable '.[all]' "$@"
        return
    fi
    "$python" -I -m pip --version >/dev/null 2>&1 || "$python" -I -m ensurepip >/dev/null
    # -qq: errors, but no warnings. Debian 12 and Python 3.10 bring a pip that knows no dependency groups.
    "$python" -I -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' ||
        "$python" -I -m pip install -qq --disable-pip-version-check --upgrade 'pip>=25.1'
    "$python" -I -m pip install -qq --disable-pip-version-check --editable '.[all]' "$@"
}

# Runs when the work is done, has failed or was interrupted: the next start finds what was there before, or a whole
# environment, or none.
env_leave() {
    case $env_undo in
        remove) rm -rf "$env_dir" ;;
        unstamp) rm -f "$env_stamp" ;;
        restore) printf '%s\n' "$env_previous" >"$env_stamp" ;;
    esac
    rm -rf "$env_lock"
}

# Runs in a subshell: its traps, directory and variables end with it.
env_make() (
    # `set -e` is off wherever the caller tests our status, so each step says itself what a failure means.
    cd "$root" || exit 1
    env_acquire || exit 1
    env_undo=
    trap env_leave EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if env_is_current "$1"; then
        exit 0 # the process that was waited for has made it
    fi

    env_level=$1
    env_stamped=$(env_stamp_line 3)
    if [ "$(env_rank "$env_stamped")" -gt "$(env_rank "$env_level")" ]; then
        env_level=$env_stamped # ./demo does not take away what ./test needs
    fi
    env_how="python3 -m venv and pip"
    if env_has_uv; then env_how=uv; else env_find_python; fi

    # An environment that runs is brought up to date in place; what is broken, half made or made for another path or
    # Python is made anew. One without a stamp of ours that works was made by a developer: it is kept, and added to.
    env_found=$(env_interpreter)
    env_line=$(env_stamp_line 1)
    if [ -f "$env_stamp" ] && { [ "${env_line#* }" != "$root" ] || [ "$(env_stamp_line 2)" != "$env_found" ]; }; then
        env_found=
    fi
    if [ -n "$env_found" ]; then
        env_say "bringing .venv up to date with $env_how"
        if [ -f "$env_stamp" ]; then
            env_previous=$(cat "$env_stamp")
            env_undo=restore
        else
            env_undo=unstamp
        fi
        echo making >"$env_stamp"
    else
        env_say "making .venv with $env_how, once: this takes up to a minute"
        env_undo=remove
        env_create || exit 1
    fi
    env_install "$env_level" ||
        { env_say "installing the dependencies into .venv failed: the reason is above."; exit 1; }

    printf '%s\n%s\n%s\n' "$(env_wanted)" "$(env_interpreter)" "$env_level" >"$env_dir/.workerpools.new"
    mv "$env_dir/.workerpools.new" "$env_stamp"
    env_undo=
)

environment() {
    if ! env_is_current "$1"; then
        # Ctrl-C reaches the subshell as well, which tidies up; with a trap of its own this shell waits for that.
        env_caught=
        trap 'env_caught=129' HUP
        trap 'env_caught=130' INT
        trap 'env_caught=143' TERM
        env_status=0
        env_make "$1" || env_status=$?
        trap - HUP INT TERM
        [ -z "$env_caught" ] || exit "$env_caught"
        [ "$env_status" -eq 0 ] || exit "$env_status"
    fi
    PATH=$env_dir/bin:$PATH
    export PATH
}
